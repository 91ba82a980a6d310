"""The loss curve of `core.GPT.fit` beside that of plain eager PyTorch, step by step, in fp32.

    python bench/loss_parity.py tiny small          about ten minutes; bench/results/cpu/parity.json

Both start from the same weights, draw MyPT's batches from torch's global generator, dropout
included, and train on GPT-2 tokens of Python sources. The plain side is that of the tests: modules
of torch.nn, full logits, torch's AdamW. `small` reads 2 of its 32 sequences a step.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the CLI does

sys.path.append(str(Path(__file__).parent.parent / "tests" / "core"))

import fit_help
import numpy as np
from record import RESULTS, machine, save

from mypt_fast import presets
from mypt_fast.tokenizer import Tokenizer

STEPS, PEAK, WARMUP = 200, 3e-4, 10
SEQUENCES = {"small": 2}
BAR = 1e-4


def corpus() -> np.ndarray:
    """Half a million tokens of the standard library."""
    folder = Path(os.__file__).parent
    names = ("argparse", "ast", "inspect", "subprocess", "tarfile", "typing", "zipfile", "turtle")
    texts = [
        (folder / f"{name}.py").read_text("utf-8")
        for name in names
        if (folder / f"{name}.py").is_file()
    ]
    return Tokenizer.gpt2().encode_to_numpy("\n".join(texts)).astype(np.int64)


def compare(name: str, tokens: np.ndarray) -> dict:
    """Train both for 200 steps; returns their losses and the largest difference."""
    cfg = presets.load(name).model
    cfg.device, cfg.batch_size = "cpu", SEQUENCES.get(name, cfg.batch_size)
    ours = fit_help.model_of(cfg)
    plain = fit_help.PlainGPT(cfg)
    plain.load_state_dict(ours.state_dict())
    fit_help.run(
        cfg, fit_help.TextLoader(cfg, tokens), STEPS, model=ours, learning_rate=PEAK,
        warmup_iters=WARMUP, eval_interval=100, log_file=f"{name}.jsonl", use_amp=False,
    )  # fmt: skip
    found = [e["loss"] for e in fit_help.events(f"{name}.jsonl", "train")]
    fit_help.seed_everything(11)
    losses, _ = fit_help.plain_fit(
        plain, fit_help.TextLoader(cfg, tokens), STEPS, lr=PEAK, warmup=WARMUP, eval_interval=100
    )
    worst = max(abs(a - b) for a, b in zip(found, losses, strict=True))
    return {
        "preset": name, "batch_size": cfg.batch_size, "block_size": cfg.block_size, "steps": STEPS,
        "dropout": cfg.dropout, "largest_difference": float(f"{worst:.3g}"),
        "ours": found, "plain": [round(x, 6) for x in losses],
    }  # fmt: skip


def earlier() -> list[dict]:
    """What was measured before, preset by preset."""
    path = RESULTS / "cpu" / "parity.json"
    return json.loads(path.read_text())["rows"] if path.is_file() else []


def main() -> int:
    """Compare the presets named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("presets", nargs="+")
    names = parser.parse_args().presets
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        tokens = corpus()
        for name in names:
            rows.append(compare(name, tokens))
            row = rows[-1]
            print(
                f"{name}: {row['ours'][0]:.4f} to {row['ours'][-1]:.4f}, largest difference "
                f"{row['largest_difference']:.2g}", flush=True,
            )  # fmt: skip
        os.chdir("/")
    kept = [row for row in earlier() if row["preset"] not in names]
    save("parity", {**machine(), "bar": BAR}, kept + rows)
    return int(any(row["largest_difference"] > BAR for row in rows))


if __name__ == "__main__":
    sys.exit(main())
