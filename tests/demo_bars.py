"""What `make demo` promises, checked on what it left behind: run it after `make demo`."""

import json
import subprocess
import sys
from pathlib import Path

WORDS = ("def", "self", "return", "import", "if", "class", "for")


def main() -> None:
    for path in ("demo/model.pt", "demo_gold/model.pt", "demo_fp16/model.pt"):
        assert Path("checkpoints", path).is_file(), f"checkpoints/{path} is missing"
    assert Path("loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    lines = Path("logs/train/demo_eval.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    assert last["event"] == "training_complete"
    assert last["final_val_loss"] < 2.0, f"final val loss {last['final_val_loss']}"
    command = [sys.executable, "-m", "mypt_fast", "generate", "--model_name", "demo_gold"]
    command += ["--prompt", "class ", "--max_new_tokens", "500", "--seed", "1"]
    command += ["--temperature", "0.9", "--repeat_window", "0"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = [word for word in WORDS if word in text[len("class ") :]]
    assert len(found) >= 4, f"only {found} in the sample:\n{text}"
    print(f"demo: val loss {last['final_val_loss']}, the sample holds {', '.join(found)}")


if __name__ == "__main__":
    main()
