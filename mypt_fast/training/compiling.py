"""Whether a run is compiled: as asked, on a GPU always, on a CPU where it pays back."""

from __future__ import annotations

import os
import shutil

import torch

from mypt_fast.accounting import flops_per_token
from mypt_fast.config import TrainConfig
from mypt_fast.data.loader import TokenLoader
from mypt_fast.errors import ConfigError
from mypt_fast.kernels import missing_for_triton, missing_header
from mypt_fast.training.run import Choice, Run

# Measured on two cores (docs/decisions.md). GAIN: the share of its eager time that a SwiGLU block
# saves compiled, the least of two dtypes; GELU blocks save nothing, and dropout makes compiled ones
# slower. COMPILE_S: a cold start's compilation, evaluation's graphs included. Warm caches make it
# cheaper, but whether they are warm is not known before.
GAIN = 0.09
COMPILE_S = 60.0
MARGIN = 2.0  # times the predicted price that must be won: speed and gain are guesses


def choose(run: Run, start_step: int) -> Choice:
    """The run's choice, made once: asked again, it answers the same.

    On a CPU a resumed run keeps what it was saved with, for the bits of its steps depend on it.

    Raises:
        ConfigError: if what was asked for cannot be.
    """
    if run.choice is None:
        run.choice = _chosen(run, start_step)
    return run.choice


def _chosen(run: Run, start_step: int) -> Choice:
    asked = settled(run.settings.train, run.device)
    if asked is not None:
        lacking = _lacking(run.device) if run.settings.train.compile == "auto" else None
        why = f": {lacking} is missing" if lacking else ""  # nothing is slower without a word
        return Choice(asked, "compiled" if asked else f"eager{why}")
    kept = None if "compile" in run.settings.typed else _kept(run)
    if kept is False:
        return Choice(False, "eager")
    if lacking := _lacking(run.device):
        return Choice(False, f"eager: {lacking} is missing")
    return Choice(True, "compiled") if kept else _payback(run, start_step)


def settled(cfg: TrainConfig, device: torch.device) -> bool | None:
    """What settings and device decide; None: the length of the run does, on a CPU.

    Raises:
        ConfigError: if what was asked for cannot be.
    """
    asked = "--compile on" if cfg.compile == "on" else ""
    if cfg.kernels == "inductor":
        asked = "--kernels inductor"
        if cfg.compile == "off":
            raise ConfigError(
                "--kernels inductor is torch.compile's own code",
                "found --compile off",
                "drop one of the two",
            )
    if not asked and cfg.compile == "auto" and device.type == "cpu":
        return None
    lacking = None if cfg.compile == "off" else _lacking(device)
    if asked and lacking:
        raise ConfigError(f"{asked} needs {lacking}", "found none", "install it, or drop the flag")
    return bool(asked) or (cfg.compile == "auto" and lacking is None)


def _lacking(device: torch.device) -> str | None:
    """What torch.compile needs on this device and the machine does not have."""
    if device.type == "cpu":
        compiler = os.environ.get("CXX", "g++")
        if shutil.which(compiler) is None:
            return f"a C++ compiler ({compiler})"
        return missing_header("CPLUS_INCLUDE_PATH")
    return missing_for_triton()


def _kept(run: Run) -> bool | None:
    """Whether the saved run was compiled; None where there is none, or it ran elsewhere."""
    plan = run.settings.saved_state.get("plan")
    if not isinstance(plan, dict) or plan.get("device", "cpu") != run.device.type:
        return None
    return plan.get("compiled") is True  # older ones do not tell: on a CPU they were eager


def _payback(run: Run, start_step: int) -> Choice:
    """Compiled where the steps that are left win the compilation's time back with a margin."""
    from mypt_fast.training.plan import estimated_tokens_per_s

    s, left = run.settings, run.settings.train.max_iters - start_step
    cfg = s.model
    one_graph = all(isinstance(p.train, TokenLoader) for p in run.phases)  # documents break it
    speed = estimated_tokens_per_s(run)
    if cfg.mlp_type != "swiglu" or cfg.dropout or not one_graph or speed is None:
        return Choice(False, "eager")
    step_s = s.global_batch * cfg.block_size / speed
    head = 6 * cfg.n_embd * cfg.vocab_size / flops_per_token(cfg)  # is not compiled
    saved_s = GAIN * (1 - head) * step_s
    if saved_s * left < MARGIN * COMPILE_S:
        return Choice(False, "eager")
    return Choice(True, f"compiled: pays back after {COMPILE_S / saved_s:,.0f} of {left:,} steps")
