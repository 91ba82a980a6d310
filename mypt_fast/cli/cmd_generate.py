"""`mypt-fast generate`: continue a prompt with a trained model."""

import argparse
import json
import re
import secrets
import sys
import time
from pathlib import Path
from typing import Any

from mypt_fast import console
from mypt_fast.cli.flags import Switch
from mypt_fast.errors import ConfigError, DataError

HELP = "write text with a trained model"
DESCRIPTION = """\
Continue a prompt. Text goes to stdout as it is written, everything else to stderr. Texts longer
than the model's context slide on: the window moves, generation does not stop."""
EXAMPLES = """\
examples:
  mypt-fast generate --model_name book --prompt "Once upon"
  mypt-fast generate --model_name book_gold --preset creative --num_samples 3 --seed 1
  mypt-fast generate --model_name book --prompt_file start.txt --max_new_tokens 2000 > story.txt
  cat start.txt | mypt-fast generate --model_name book --prompt - --json"""
SUPPRESS = True

# temperature, top_k, top_p, repetition_penalty (MyPT specification 10.1)
PRESETS = {
    "chat": (0.7, 50, 0.9, 1.1),
    "creative": (1.0, 100, 0.95, 1.2),
    "factual": (0.3, 10, 0.8, 1.0),
    "code": (0.2, 40, 0.95, 1.0),
    "deterministic": (0.0, 1, 1.0, 1.0),
}
MODES = {"qa": "factual", "creative": "creative", "factual": "factual", "code": "code"}
SETTINGS = {"temperature": 0.8, "top_k": 50, "top_p": 0.95, "repetition_penalty": 1.1}
MAX_SEED = (1 << 63) - 1
LEAST = {"num_samples": 1, "max_new_tokens": 0, "repeat_window": 0, "seed": 0}
ESCAPES = {r"\n": "\n", r"\t": "\t", r"\r": "\r", r"\\": "\\"}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add what to write, how to sample and what to show."""
    text = parser.add_argument_group("text")
    _flag(text, "model_name", "NAME", "run under checkpoints/, or a path (default: default)")
    old = "single file of the run to read where it has no bundle (default: latest.pt, final.pt)"
    _flag(text, "legacy_checkpoint", "FILE", old)
    _flag(text, "prompt", "TEXT", "text to continue, - for stdin (default: start a new text)")
    _flag(text, "prompt_file", "FILE", "read the prompt from a UTF-8 file, or - for stdin")
    escapes = r"read \n, \t, \r and \\ in --prompt as escapes"
    text.add_argument("--escapes", action=Switch, help=escapes)
    _flag(text, "max_new_tokens", "N", "length of the continuation (default: 100)", int)
    _flag(text, "num_samples", "N", "texts to write, seeds counted up (default: 1)", int)
    stop = "further tokens to stop after: ids, or strings of one token"
    text.add_argument("--stop_tokens", nargs="+", metavar="TOKEN", help=stop)
    repeat = "stop when the last N tokens repeat the N before; 0: never (default: 32)"
    _flag(text, "repeat_window", "N", repeat, int)
    how = parser.add_argument_group("sampling (a flag wins over --preset, a preset over --mode)")
    modes, named = "settings for a purpose; qa is factual (default: basic)", "named settings"
    how.add_argument("--mode", choices=("basic", *MODES), help=modes)
    how.add_argument("--preset", choices=tuple(PRESETS), help=named)
    _flag(how, "temperature", "X", "0: always the likeliest token (default: 0.8)", float)
    _flag(how, "top_k", "N", "only the N likeliest; 0: all (default: 50)", int)
    _flag(how, "top_p", "X", "only the likeliest of this mass; 1: all (default: 0.95)", float)
    penalty = "against ids of the last 256 tokens; 1: none (default: 1.1)"
    _flag(how, "repetition_penalty", "X", penalty, float)
    _flag(how, "seed", "N", "same seed, same text (default: a new one each time)", int)
    out = parser.add_argument_group("output")
    _flag(out, "device", "NAME", "cpu, cuda or cuda:N (default: the GPU where there is one)")
    half = "fp16 weights on a GPU, whatever it could do better; a CPU stays with fp32"
    out.add_argument("--force_fp16", action="store_true", default=False, help=half)
    info, js = "model, settings and speed on stderr", "one JSON object instead of text"
    out.add_argument("--show_info", action="store_true", default=False, help=info)
    out.add_argument("--json", action="store_true", default=False, help=js)


def _flag(group: Any, name: str, letter: str, what: str, kind: type = str) -> None:
    group.add_argument(f"--{name}", metavar=letter, type=kind, help=what)


def run(args: argparse.Namespace) -> int:
    """Write; returns the exit code."""
    given = vars(args)
    count = int(given.get("num_samples", 1))
    settings = sampling(given)
    for name, least in LEAST.items():
        if given.get(name, least) < least:
            found = f"found {given[name]}"
            raise ConfigError(f"--{name} is out of range", found, f"use >= {least}")
    if given.get("seed", 0) > MAX_SEED - count:
        raise ConfigError("--seed is out of range", f"found {given['seed']}", "use less than 2^63")
    prompt = read_prompt(given)
    from mypt_fast.checkpoint.legacy import INFERENCE, choose

    name, old = given.get("model_name", "default"), given.get("legacy_checkpoint")
    path, notices = choose(name, INFERENCE, old)
    loaded = _load(path, given.get("device"), args.force_fp16)
    for text in notices + loaded.notices:
        console.notice(f"note: {text}")
    settings |= {
        "max_new_tokens": given.get("max_new_tokens", 100),
        "stop_tokens": [_stop_id(loaded.tokenizer, word) for word in given.get("stop_tokens", [])],
    }
    if "repeat_window" in given:
        settings["repeat_window"] = given["repeat_window"]
    if args.show_info:
        _show_model(path, loaded, settings)
    first = given.get("seed", secrets.randbits(32))
    try:
        texts = [
            _write(loaded, prompt, settings, first + i, args, label=i if count > 1 else None)
            for i in range(count)
        ]
    except KeyboardInterrupt:  # what was written stays; the line ends
        print(flush=True)
        console.notice("interrupted")
        return 130
    if args.json:
        report = {
            "model": str(path), "step": loaded.step, "prompt": prompt, "settings": settings,
            "samples": texts,
        }  # fmt: skip
        print(json.dumps(report, ensure_ascii=False, indent=2))
    return 0


def sampling(given: dict[str, Any]) -> dict[str, Any]:
    """Settle temperature, top_k, top_p and penalty: defaults < mode < preset < flags."""
    values = dict(SETTINGS)
    for name in (MODES.get(given.get("mode", "basic")), given.get("preset")):
        if name:
            values = dict(zip(SETTINGS, PRESETS[name], strict=True))
    return {**values, **{k: given[k] for k in SETTINGS if k in given}}


def read_prompt(given: dict[str, Any]) -> str:
    """Return the prompt, every character as it was typed."""
    if "prompt" in given and "prompt_file" in given:
        raise ConfigError("--prompt and --prompt_file are both given", cure="name one")
    source = given.get("prompt_file", "-" if given.get("prompt") == "-" else None)
    if source is None:
        text = str(given.get("prompt", ""))
        if given.get("escapes", False):
            text = re.sub(r"\\[ntr\\]", lambda m: ESCAPES[m.group()], text)
        return text
    try:
        data = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
        return data.decode("utf-8")
    except UnicodeDecodeError as e:
        raise DataError(f"prompt from {source} is not UTF-8 text", f"byte {e.start}") from e
    except OSError as e:
        raise DataError(f"cannot read prompt {source}", e.strerror or str(e)) from e


def _load(path: Path, requested: str | None, force_fp16: bool) -> Any:
    import torch

    from mypt_fast import generate
    from mypt_fast.training import device as devices

    device, note = devices.pick(requested, explicit=requested is not None)
    if note:
        console.notice(f"note: {note}")
    precision, _ = devices.precision(device, True, "bf16", explicit=False)
    dtype = precision.dtype if device.type == "cuda" else torch.float32
    if force_fp16 and device.type == "cuda":
        dtype = torch.float16
    elif force_fp16:
        console.notice("note: --force_fp16 needs a GPU; this runs in fp32")
    return generate.load(path, device, dtype)


def _stop_id(tokenizer: Any, word: str) -> int:
    if word.lstrip("-").isdigit():
        return int(word)
    ids = tokenizer.encode(word)
    if len(ids) != 1:
        found = f"it is {len(ids)} tokens"
        raise ConfigError(f"--stop_tokens {word!r}", found, "name one token, or its id")
    return int(ids[0])


def _write(
    loaded: Any, prompt: str, settings: dict[str, Any], seed: int, args: Any, label: int | None
) -> dict[str, Any]:
    """Write one text, streaming it unless JSON was asked for; returns what a machine would read."""
    from mypt_fast.generate import generate, stream_text

    generation = generate(loaded.model, loaded.tokenizer, prompt, seed=seed, **settings)
    show = not args.json
    if show:
        if label is not None:
            print(f"--- sample {label + 1} (seed {seed}) ---")
        print(prompt, end="", flush=True)
    parts, start = [], time.perf_counter()
    for part in stream_text(loaded.tokenizer, generation):
        parts.append(part)
        if show:
            print(part, end="", flush=True)
    seconds = time.perf_counter() - start
    if show:
        print(flush=True)
    n = len(generation.ids) - generation.n_prompt
    if args.show_info:
        console.notice(
            f"{n} tokens in {seconds:.2f} s ({n / max(seconds, 1e-9):.1f} tok/s), "
            f"stopped: {generation.stopped}, seed {seed}"
        )
    return {
        "text": prompt + "".join(parts), "completion": "".join(parts), "seed": seed,
        "tokens": generation.ids[generation.n_prompt :], "stopped": generation.stopped,
        "seconds": round(seconds, 4), "tokens_per_sec": round(n / max(seconds, 1e-9), 1),
    }  # fmt: skip


def _show_model(path: Path, loaded: Any, settings: dict[str, Any]) -> None:
    from mypt_fast.accounting import count_parameters

    cfg, weight = loaded.model.config, loaded.model.lm_head.weight
    n = console.count(count_parameters(cfg).total)
    console.notice(
        f"model    {path}, step {loaded.step}: {n} parameters, context {cfg.block_size}, "
        f"{loaded.tokenizer.kind} vocabulary of {cfg.vocab_size}"
    )
    console.notice(f"device   {weight.device}, {str(weight.dtype).removeprefix('torch.')}")
    console.notice("sampling " + ", ".join(f"{k} {v}" for k, v in settings.items()))
