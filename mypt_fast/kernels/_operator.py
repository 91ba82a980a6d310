"""How an operator is registered, chosen and checked; nothing here computes."""

import functools
import importlib.util
import os
import shutil
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import _get_current_dispatch_mode

IMPLS = ("auto", "triton", "reference", "inductor")
TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
PLAIN = (Tensor, torch.nn.Parameter)
OLDEST_ARCH = 75  # Turing: the oldest that Triton still compiles for
FIRST_BF16_ARCH = 80


def operator(
    forward: Callable[..., Any],
    *,
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    flops: Callable[..., int] | None = None,
    tags: Sequence[torch.Tag] = (),
) -> Callable[..., Any]:
    """Register `forward` as mypt_fast::<name> and return the function that calls it.

    Under torch.compile, or while a dispatch mode (selective checkpointing, the FLOP counter)
    looks on, the call goes through the registered operator, which is opaque: no graph break.
    Otherwise it goes straight to `forward`: the dispatcher costs more than a small kernel.

    Args:
        forward: annotated with a schema that torch.library can infer; its name, without a leading
            underscore, names the operator. It changes no argument and returns no view of one.
        fake: shapes and dtypes of the results, for tracing.
        setup_context: (ctx, inputs, output), what the backward needs; None: not differentiable.
        backward: (ctx, *gradients) to the gradients of every argument.
        flops: formula over shapes, as `torch.utils.flop_counter.register_flop_formula` takes it.
        tags: `torch.Tag.nondeterministic_seeded` where it draws random numbers itself: else
            torch.compile makes it again in the backward without its generator's state.
    """
    name = forward.__name__.lstrip("_")

    @functools.wraps(forward)
    def run(*args: Any) -> Any:
        device = next(a.device.type for a in args if isinstance(a, Tensor))
        if not autocasts(device):
            return forward(*args)
        with torch.autocast(device, enabled=False):  # an operator picks its dtypes itself
            return forward(*args)

    definition = torch.library.custom_op(f"mypt_fast::{name}", run, mutates_args=(), tags=tags)
    definition.register_fake(fake)
    direct: Callable[..., Any] = run
    if backward is not None:
        definition.register_autograd(backward, setup_context=setup_context)
        # a gradient of a gradient would pass through `forward` unseen, and be wrong
        once = once_differentiable(backward)
        parts = {"forward": run, "setup_context": setup_context, "backward": once}
        function: Any = type(
            f"{name}_autograd",
            (torch.autograd.Function,),
            {key: staticmethod(part) for key, part in parts.items() if part is not None},
        )
        direct = function.apply
    registered = getattr(torch.ops.mypt_fast, name).default
    if flops is not None:
        from torch.utils.flop_counter import register_flop_formula

        register_flop_formula(getattr(torch.ops.mypt_fast, name))(flops)

    def call(*args: Any) -> Any:
        if observed():
            return registered(*args)
        return direct(*args)

    return call


def observed() -> bool:
    """Whether somebody traces or looks on: torch.compile, or a dispatch mode."""
    return torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None


def choose(
    name: str,
    impl: str,
    x: Tensor,
    *,
    dtype: torch.dtype | None = None,
    saves_memory: bool = False,
) -> str:
    """The one rule: which implementation of operator `name` runs for `x`.

    `auto`: plain PyTorch on a CPU and for dtypes that Triton is not written for; on a GPU Triton,
    but under torch.compile only where it saves memory that no compiler saves, or was measured to
    win on that architecture (the launch table says so); elsewhere inductor fuses the plain
    expression with its neighbours.

    Args:
        name: of the operator.
        impl: one of `IMPLS`.
        x: the tensor whose device and dtype decide.
        dtype: what the kernels will compute in, where autocast makes that another one.
        saves_memory: whether the operator keeps less for the backward than the expression does.

    Returns:
        "triton", "reference" (an operator that torch.compile does not look into) or "inductor"
        (the plain PyTorch expression).

    Raises:
        ValueError: for an unknown `impl`, and for a forced one that cannot run here.
        TypeError: for a DTensor.
    """
    if impl not in IMPLS:
        raise ValueError(f"{name}: impl must be one of {', '.join(IMPLS)}; found {impl!r}")
    if type(x) not in PLAIN:
        expect_tensors(name, x=x)
    if impl in ("reference", "inductor"):
        return impl
    if impl == "auto" and x.device.type == "cpu":
        return "inductor"
    reason = _obstacle(x.device.type, x.device.index or 0, dtype or x.dtype)
    if impl == "triton":
        if reason:
            raise ValueError(
                f"{name}: impl='triton' cannot run: {reason}; impl='auto' takes what can"
            )
        return impl
    if reason:
        return "inductor"
    if saves_memory or not torch.compiler.is_compiling():
        return "triton"
    return "triton" if _measured_to_win(name, x.device.index or 0) else "inductor"


def why_not(impl: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a forced `impl` cannot run on this device for this dtype, or None."""
    if impl != "triton":
        return None
    return _obstacle(device.type, device.index or 0, dtype)


def describe(impl: str, device: torch.device, dtype: torch.dtype, compiled: bool) -> str:
    """What `impl` comes to on this device, in a few words for the start line of a run."""
    if impl != "auto":
        return f"{impl} kernels"
    if device.type == "cpu" or _obstacle(device.type, device.index or 0, dtype):
        return "PyTorch kernels"
    return "Triton loss, inductor elsewhere" if compiled else "Triton kernels"


# The answers do not change while a process runs: torch.compile may take them as constants.


@torch.compiler.assume_constant_result
def _obstacle(device: str, index: int, dtype: torch.dtype) -> str | None:
    """Why Triton cannot run on this device for this dtype, or None."""
    if dtype not in TRITON_DTYPES:
        return f"expected fp16, bf16 or fp32; found {dtype}"
    if not _triton_is_installed():
        return "Triton is not installed"
    if device == "cpu":
        if os.environ.get("TRITON_INTERPRET") == "1":
            return None
        return "the tensors are on the CPU, where only TRITON_INTERPRET=1 (for tests) runs it"
    if device != "cuda":
        return f"found device {device}"
    arch = device_arch(index)
    if arch < OLDEST_ARCH:
        return f"needs compute capability {OLDEST_ARCH / 10}; found {arch / 10}"
    if dtype is torch.bfloat16 and arch < FIRST_BF16_ARCH:
        return f"bf16 needs compute capability {FIRST_BF16_ARCH / 10}; found {arch / 10}: use fp16"
    lacking = missing_for_triton()
    if lacking and os.environ.get("TRITON_INTERPRET") != "1":  # which compiles nothing
        return f"needs {lacking}; found none: install it"
    return None


@torch.compiler.assume_constant_result
def _measured_to_win(name: str, index: int) -> bool:
    from mypt_fast.kernels.jit import launch

    return launch.beats_compile(name, device_arch(index))


@functools.cache
def _triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def missing_for_triton() -> str | None:
    """What launches on a GPU need besides Triton and this machine does not have, or None.

    Triton compiles a module of its own in C at the first launch, with the compiler of
    `triton/runtime/build.py`: what CC names, else gcc or clang, never cc. Where its cache still has
    that module from other days it would need none; that is not looked for.
    """
    compiler = os.environ.get("CC")
    if compiler is not None:
        if shutil.which(compiler) is None:
            return f"a C compiler (CC is {compiler!r})"
    elif not any(map(shutil.which, ("gcc", "clang"))):
        return "a C compiler (gcc or clang)"
    return missing_header("C_INCLUDE_PATH")


def missing_header(variable: str) -> str | None:
    """Python's header, in words, where a compiler would not find it; None where it would.

    Args:
        variable: the environment's name of further folders that compilers of the language look in.
    """
    own = sysconfig.get_path("include", "posix_prefix")  # Debian's default is /usr/local's
    paths = [os.environ.get(name, "") for name in ("CPATH", variable)]
    folders = [own, *os.pathsep.join(paths).split(os.pathsep)]
    if any(folder and Path(folder, "Python.h").is_file() for folder in folders):
        return None
    return f"Python's C header (Python.h of python3-dev, in {own})"


@functools.cache
def device_arch(index: int) -> int:
    """Compute capability of a GPU as one number: 9.0 is 90."""
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def run_expression(function: Callable[..., Any], impl: str, *args: Any, **kwargs: Any) -> Any:
    """Run a plain expression; forced outside torch.compile, it is compiled by itself.

    Inside a compiled region, and where `auto` chose it in eager mode, it is called as it is.
    """
    if impl != "inductor" or torch.compiler.is_compiling():
        return function(*args, **kwargs)
    # a program may try many shapes and options; past the limit a whole graph is refused
    with torch._dynamo.config.patch(recompile_limit=256):
        return _compiled(function)(*args, **kwargs)


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True)


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype matmuls of `x` run in: autocast's, which leaves fp64 alone, else that of `x`."""
    device = x.device.type
    if x.dtype is torch.float64 or not autocasts(device):
        return x.dtype
    return torch.get_autocast_dtype(device)


def autocasts(device: str) -> bool:
    """Whether autocast is on; "meta" and others have none."""
    return device in ("cpu", "cuda") and torch.is_autocast_enabled(device)


def is_on_host(t: Tensor) -> bool:
    """Whether a tensor's values can be read without waiting for a device."""
    return t.device.type == "cpu"


def expect_tensors(name: str, **tensors: Tensor) -> None:
    """Raise TypeError for what is no tensor, and for a DTensor, of which kernels see one shard."""
    for argument, t in tensors.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}: expected {argument} to be a tensor; found {type(t).__name__}")
        if type(t).__name__ == "DTensor":
            raise TypeError(
                f"{name}: expected plain tensors; {argument} is a DTensor: pass .to_local() or "
                "gather it"
            )


def alike_on_cpu(x: Tensor, *others: Tensor | None) -> bool:
    """Whether all are plain tensors on the CPU, of one floating dtype.

    Then what remains to check are the shapes: decoding a token calls a small operator dozens of
    times, and every further question costs as much as a tenth of one.
    """
    dtype = x.dtype
    if not x.is_cpu or type(x) not in PLAIN or not dtype.is_floating_point:
        return False
    return all(t is None or (type(t) in PLAIN and t.dtype is dtype and t.is_cpu) for t in others)


def expect_shape(name: str, argument: str, t: Tensor | None, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless `t` is None or has exactly `shape`."""
    if t is not None and tuple(t.shape) != shape:
        raise ValueError(f"{name}: expected {argument} of shape {shape}; found {tuple(t.shape)}")


def expect_same_device(name: str, x: Tensor, **others: Tensor | None) -> None:
    """Raise ValueError if a tensor lies elsewhere than `x`, TypeError for a DTensor."""
    device = x.device
    for argument, t in others.items():
        if t is None:
            continue
        if type(t) not in PLAIN:  # decoding a token asks this a hundred times
            expect_tensors(name, **{argument: t})
        if t.device != device:
            raise ValueError(f"{name}: expected {argument} on {device}; found {t.device}")


def expect_floating(name: str, **tensors: Tensor | None) -> None:
    """Raise TypeError for a tensor that is not fp16, bf16, fp32 or fp64."""
    for argument, t in tensors.items():
        if t is not None and t.dtype not in (*TRITON_DTYPES, torch.float64):
            raise TypeError(
                f"{name}: expected {argument} of fp16, bf16, fp32 or fp64; found {t.dtype}"
            )
