"""`mypt-fast data`: look at token files, check every byte of them, write them in another format."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mypt_fast import console
from mypt_fast.errors import IntegrityError, MyptError, TokenRangeError

if TYPE_CHECKING:
    from mypt_fast.data.format.shard import Shard

HELP = "inspect, verify and convert datasets of token shards"
DESCRIPTION = """\
inspect PATH        what a dataset or a file of tokens holds; headers, indexes and sizes are checked
verify PATH         check them and say so; --full also reads and hashes every token
convert PATH OUT    check everything and write it in another format, into a new folder

Read are native shards, MyPT's token streams and episodes, nanoGPT's train.bin and val.bin (its
meta.pkl is never opened), llm.c's files and Megatron's .bin and .idx. A format is what the
metadata says or a magic number says, never a guess. Exit code 3: something is damaged.
"""
EXAMPLES = """\
examples:
  mypt-fast data inspect data/books
  mypt-fast data verify data/books --full
  mypt-fast data convert nanoGPT/data/shakespeare data/shakespeare --tokenization gpt2
  mypt-fast data convert data/books data/books_llmc --format llmc --lossy
  mypt-fast data inspect tokens.bin --input_dtype uint16
"""
NO_TOKENIZER = (
    "none beside the tokens, which training needs; if they are GPT-2's: "
    "mypt-fast data convert {} OUT --tokenization gpt2"
)
ACTIONS = ("inspect", "verify", "convert")
TARGETS = ("native", "mypt", "episodes", "nanogpt", "llmc", "megatron")
DTYPES = ("uint16", "uint32")
# flag: the actions that know it
_FLAGS = {
    "full": ("verify",),
    "workers": ("verify", "convert"),
    "json": ("inspect",),
    "format": ("convert",),
    "dtype": ("convert",),
    "lossy": ("convert",),
    "tokenization": ("convert",),
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add what to do, with what."""
    parser.add_argument("action", choices=ACTIONS, metavar="ACTION", help=", ".join(ACTIONS))
    parser.add_argument("path", metavar="PATH", help="a dataset's folder, or a file of tokens")
    parser.add_argument("out", nargs="?", metavar="OUT", help="convert: the new folder")
    parser.add_argument(
        "--input_dtype", choices=DTYPES, help="what a file without a header holds; never guessed"
    )
    parser.add_argument("--json", action="store_true", help="inspect: one JSON object")
    parser.add_argument(
        "--full", action="store_true", help="verify: also read and hash tokens, masks and padding"
    )
    parser.add_argument(
        "--workers", type=int, metavar="N", help="reading threads (default: one per CPU core)"
    )
    parser.add_argument("--format", choices=TARGETS, help="convert: what to write (native)")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="convert: width (what holds the vocabulary; mypt: uint32)"
    )
    parser.add_argument(
        "--lossy", action="store_true", help="convert: leave out what the format cannot carry"
    )
    parser.add_argument(
        "--tokenization",
        choices=("gpt2",),
        help="convert: say whose tokens they are, where a dataset (nanoGPT, llm.c) does not",
    )


def run(args: argparse.Namespace) -> int:
    """Inspect, verify or convert; returns the exit code."""
    _check_usage(args)
    path = Path(args.path)
    if args.action == "convert":
        return _convert(args, path)
    if args.action == "verify":
        return _verify(args, path)
    report = describe(path, args.input_dtype)
    print(json.dumps(report, indent=2) if args.json else "\n".join(map(_printable, lines(report))))
    return 0


def _check_usage(args: argparse.Namespace) -> None:
    for flag, actions in _FLAGS.items():
        if getattr(args, flag) and args.action not in actions:
            raise MyptError(f"--{flag} with {args.action}", cure=f"it is for {', '.join(actions)}")
    if (args.out is not None) != (args.action == "convert"):
        cure = "usage: mypt-fast data inspect|verify PATH, or convert PATH OUT"
        raise MyptError(f"{args.action} with {'two paths' if args.out else 'one path'}", cure=cure)
    if args.workers is not None and not 1 <= args.workers <= 256:
        raise MyptError(f"--workers {args.workers}", "out of range", "use 1 to 256")


def _verify(args: argparse.Namespace, path: Path) -> int:
    from mypt_fast.data.format.source import open_source
    from mypt_fast.data.format.verify import verify_source

    source = open_source(path, args.input_dtype)
    try:
        report = verify_source(source, args.full, args.workers)
    except TokenRangeError as error:  # here the question is whether the data is sound
        raise IntegrityError(error.what, error.found, error.cure) from error
    _tell(source.shards)
    if report.unhashed and args.full:
        console.notice(
            f"note: no hash is recorded for {len(report.unhashed)} of {_shards(report.shards)}; "
            "of their tokens only the range was checked"
        )
    done = _printable(f"{path}: {_shards(report.shards)}, {report.tokens:,} tokens")
    if not args.full:
        print(f"{done}; headers, indexes and sizes are right (--full also reads the tokens)")
        return 0
    speed = report.bytes_read / 1e9 / max(report.seconds, 1e-9)
    print(
        f"{done}; verified {console.bytes_text(report.bytes_read)} in {report.seconds:.2f} s, "
        f"{speed:.2f} GB/s"
    )
    return 0


def _convert(args: argparse.Namespace, path: Path) -> int:
    from mypt_fast.data.format.convert import convert

    target = args.format or "native"
    done = convert(
        path, Path(args.out), target, dtype=args.dtype, input_dtype=args.input_dtype,
        lossy=args.lossy, workers=args.workers, tokenization=args.tokenization,
    )  # fmt: skip
    for note in done.notes:
        console.notice(_printable(f"note: {note}"))
    print(
        f"{_printable(str(done.out))}: {done.tokens:,} tokens as {target}, uint{8 * done.width}, "
        f"in {done.seconds:.1f} s"
    )
    return 0


def describe(path: Path, input_dtype: str | None = None) -> dict[str, Any]:
    """Collect what `inspect` shows; raises as `open_source` and `read_tokenizer`."""
    from mypt_fast.data.format.source import open_source
    from mypt_fast.data.format.tokenizer_file import read_tokenizer

    source = open_source(path, input_dtype)
    return {
        "path": str(path),
        "splits": {split: _split(shards) for split, shards in source.splits.items()},
        "tokenization": source.metadata.get("tokenization"),
        "tokenizer": read_tokenizer(source.path) is not None,
    }


def _split(shards: list[Shard]) -> dict[str, Any]:
    from mypt_fast.data.format.shard import count_documents, dataset_fingerprint

    largest = [shard.max_token for shard in shards if shard.max_token is not None]
    return {
        "format": shards[0].format,
        "dtypes": sorted({f"uint{8 * shard.width}" for shard in shards}),
        "tokens": sum(shard.n_tokens for shard in shards),
        "documents": count_documents(shards),
        "shards": len(shards),
        "planes": sorted({plane.kind for shard in shards for plane in shard.planes}),
        "vocab_size": max(shard.vocab_size for shard in shards) or None,
        "eot_id": next((shard.eot_id for shard in shards if shard.eot_id >= 0), None),
        "max_token": max(largest) if len(largest) == len(shards) else None,
        "fingerprint": dataset_fingerprint(shards),
        "notices": [shard.notice for shard in shards if shard.notice],
        "files": [
            {
                "name": shard.name,
                "tokens": shard.n_tokens,
                "documents": shard.documents.count if shard.documents else None,
            }
            for shard in shards
        ],
    }


def lines(report: dict[str, Any]) -> list[str]:
    """Return the report as people read it."""
    out = [f"dataset       {report['path']}"]
    if report["tokenization"] is not None:
        out.append(f"tokenization  {report['tokenization']}")
    for split, found in report["splits"].items():
        documents = found["documents"]
        shown = "documents not recorded" if documents is None else f"{documents:,} documents"
        out += [
            f"{split:<14}{found['format']}, {' and '.join(found['dtypes'])}: "
            f"{found['tokens']:,} tokens, {shown}, {_shards(found['shards'])}",
            f"  fingerprint {found['fingerprint']}",
        ]
        ids = [
            f"{key} {found[key]:,}"
            for key in ("vocab_size", "eot_id", "max_token")
            if found[key] is not None
        ]
        out += [f"  ids         {', '.join(ids)}"] if ids else []
        out += [f"  planes      {', '.join(found['planes'])}"] if found["planes"] else []
        out += [f"  note        {notice}" for notice in found["notices"]]
    if not report["tokenizer"]:
        out.append(f"tokenizer     {NO_TOKENIZER.format(report['path'])}")
    return out


def _shards(n: int) -> str:
    return f"{n:,} shard" if n == 1 else f"{n:,} shards"


def _printable(line: str) -> str:
    """No control character of a file's name reaches the terminal."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)


def _tell(shards: list[Shard]) -> None:
    for shard in shards:
        if shard.notice:
            console.notice(_printable(f"note: {shard.notice}"))
