"""`mypt-fast prepare`: text to token shards."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from mypt_fast import console
from mypt_fast.errors import DataError

HELP = "turn text into a dataset of token shards"
DESCRIPTION = """\
Turn text files, directories, patterns, JSONL or standard input (-) into a dataset of token
shards: <out_dir>/train, <out_dir>/val, tokenizer_state.json and dataset_metadata.json. Text is
kept as it is, byte for byte, unless --mypt_clean asks for MyPT's line pipeline. A file or a JSONL
row is a document; whole documents go to validation by a hash of their beginning, and where that
gives too few tokens, the end of the text does. The dataset appears complete or not at all; the
same command goes on with what a killed one had done.
"""
EXAMPLES = """\
examples:
  mypt-fast prepare notes/ book.txt --out_dir data/mine
  mypt-fast prepare 'web/*.jsonl.gz' --text_field content --out_dir data/web
  zcat dump.gz | mypt-fast prepare - --tokenization char --out_dir data/dump
  mypt-fast prepare --demo --out_dir data/demo      (Python's own standard library)
  mypt-fast prepare --chat talks.jsonl --pack_block_size 1024 --out_dir data/talks

then train on it:
  mypt-fast train --config configs/150M_1024.json --dataset_dir data/mine
"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags; defaults are those of `PrepareOptions`."""
    _add_input_flags(parser)
    _add_token_flags(parser)
    _add_clean_flags(parser)
    _add_chat_flags(parser)
    run_flags = parser.add_argument_group("running")
    run_flags.add_argument(
        "--overwrite", action="store_true", help="replace a dataset made from other inputs"
    )
    run_flags.add_argument(
        "--workers", type=int, metavar="N", help="encoding threads (default: one per CPU core)"
    )
    run_flags.add_argument(
        "--encoder",
        default="auto",
        choices=("auto", "tiktoken", "gigatoken"),
        help="what makes GPT-2 tokens: auto takes gigatoken, many times faster, where it is "
        "installed (mypt_fast[prep]) and proves to give tiktoken's tokens",
    )
    run_flags.add_argument(
        "--json", action="store_true", help="print the metadata as JSON instead of the summary"
    )


def _add_input_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("input and output")
    group.add_argument(
        "inputs",
        nargs="*",
        metavar="INPUT",
        help="text files of any name, .jsonl, .gz, directories (searched for text and source "
        "code), quoted patterns, or - for plain text on standard input",
    )
    group.add_argument(
        "--input_files", nargs="+", default=[], metavar="INPUT", help="the same, as a flag"
    )
    group.add_argument(
        "--demo", action="store_true", help="use this Python's standard library as the text"
    )
    group.add_argument("--out_dir", metavar="DIR", help="where the dataset goes (required)")
    group.add_argument(
        "--text_field", default="text", metavar="KEY", help="JSONL key that holds the text (text)"
    )


def _add_token_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("tokens")
    group.add_argument(
        "--tokenization",
        default="gpt2",
        choices=("gpt2", "char", "bpe"),
        help="gpt2: GPT-2's 50,257 tokens (default); char: one per character, for small models; "
        "bpe: train a vocabulary on this text",
    )
    group.add_argument(
        "--vocab_size", type=int, default=8192, metavar="N", help="tokens of a new bpe (8192)"
    )
    group.add_argument(
        "--no_eot", action="store_true", help="do not end each document with <|endoftext|>"
    )
    group.add_argument(
        "--format",
        default="native",
        choices=("native", "mypt"),
        help="native: checked shards of uint16 where the vocabulary allows (default); mypt: "
        "MyPT's flat uint32",
    )
    group.add_argument(
        "--tokens_per_shard", type=int, default=10_000_000, metavar="N", help="(10000000)"
    )
    group.add_argument(
        "--val_fraction",
        type=float,
        default=0.1,
        metavar="F",
        help="share of the text held back for validation (0.1); the demo's is fixed",
    )


def _add_clean_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument_group("repeated documents").add_argument(
        "--dedup",
        action="store_true",
        help="leave out documents whose text is equal to an earlier one's, which are counted in "
        "any case; memory for that: 16 bytes a document",
    )
    group = parser.add_argument_group("cleaning (off unless --mypt_clean)")
    for flag, text in (
        ("--mypt_clean", "MyPT's pipeline by lines: lower-case, drop short lines, drop repeats"),
        ("--no_normalize", "with --mypt_clean: keep case and inner white space"),
        ("--no_filter", "with --mypt_clean: keep lines of any length"),
        ("--no_dedup", "with --mypt_clean: keep repeated lines"),
    ):
        group.add_argument(flag, action="store_true", help=text)


def _add_chat_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("conversations")
    group.add_argument(
        "--chat",
        nargs="+",
        metavar="FILE",
        help='JSONL of {"messages": [{"role", "content"}, ...]} for fine-tuning, to a dataset of '
        "episodes with loss masks; .gz too",
    )
    group.add_argument(
        "--pack_block_size",
        type=int,
        metavar="N",
        help="with --chat: lay conversations into rows of N tokens, which do not see each other",
    )
    group.add_argument(
        "--system_prompt",
        metavar="TEXT",
        help='with --chat: of conversations that bring none ("You are MyPT."); "" for none',
    )
    group.add_argument(
        "--skip_bad_rows",
        action="store_true",
        help="with --chat: leave out and count what is no conversation, rather than stop there",
    )


def _run_chat(args: argparse.Namespace) -> int:
    if args.inputs or args.input_files or args.demo or args.tokenization != "gpt2":
        raise DataError(
            "--chat", "beside text inputs or another tokenization than gpt2", "drop one of them"
        )
    from mypt_fast.data.chat import DEFAULT_SYSTEM
    from mypt_fast.data.chat_prepare import ChatOptions, prepare_chat

    prompt = DEFAULT_SYSTEM if args.system_prompt is None else args.system_prompt
    options = ChatOptions(
        args.out_dir, tuple(args.chat), args.val_fraction, args.pack_block_size, prompt,
        args.skip_bad_rows, args.overwrite,
    )  # fmt: skip
    with console.byte_progress() as progress:
        metadata = prepare_chat(options, progress, _note)
    print(json.dumps(metadata, indent=2) if args.json else _chat_summary(metadata, args.out_dir))
    return 0


def _chat_summary(metadata: dict[str, Any], out_dir: str) -> str:
    lines = [f"dataset     {out_dir}"]
    for split in ("train", "val"):
        tokens, learned = (metadata[f"num_{split}_{k}tokens"] for k in ("", "learned_"))
        lines.append(
            f"{split:<12}{_counted(metadata[f'num_{split}_conversations'], 'conversation')} in "
            f"{_counted(metadata[f'num_{split}_episodes'], 'row')}, {tokens:,} tokens, "
            f"{learned:,} of them learned"
        )
    for key, text in (
        ("num_cut_conversations", "conversations longer than a packed row keep their last tokens"),
        ("num_bad_rows", "bad rows left out"),
    ):
        if metadata[key]:
            lines.append(f"note        {metadata[key]:,} {text}")
    next_line = "mypt-fast train --config CONFIG --use_loss_mask --dataset_dir"
    return "\n".join([*lines, f"next        {next_line} {out_dir}"])


def run(args: argparse.Namespace) -> int:
    """Prepare the dataset and print what came out."""
    if args.chat and args.out_dir:
        return _run_chat(args)
    inputs = (*args.inputs, *args.input_files)
    if not args.out_dir:
        raise DataError("--out_dir", "is not given", "name a directory for the dataset")
    if not inputs and not args.demo:
        raise DataError("no input", cure="name files or directories, - for stdin, or --demo")
    switches = [name for name in ("no_normalize", "no_filter", "no_dedup") if getattr(args, name)]
    if switches and not args.mypt_clean:
        # MyPT's own command cleans by default; its habitual flags mean "leave my text alone".
        names = ", ".join(f"--{name}" for name in switches)
        _note(f"{names} without --mypt_clean: nothing is cleaned anyway")

    from dataclasses import fields

    from mypt_fast.data.prepare import PrepareOptions, prepare

    given = {f.name: getattr(args, f.name) for f in fields(PrepareOptions) if f.name in args}
    given["input_files"] = inputs
    with console.byte_progress() as progress:
        metadata = prepare(PrepareOptions(**given), progress, _note)
    print(json.dumps(metadata, indent=2) if args.json else _summary(metadata, args.out_dir))
    return 0


def _note(line: str) -> None:
    print(f"note: {line}", file=sys.stderr)


def _summary(metadata: dict[str, Any], out_dir: str) -> str:
    lines = [
        f"dataset     {out_dir}",
        f"tokens      {metadata['total_tokens']:,} ({metadata['tokenization']}, "
        f"vocab_size {metadata['vocab_size']}, {metadata['format']} {metadata['dtype']})",
    ]
    lines += [
        f"{split:<12}{metadata[f'num_{split}_tokens']:,} tokens, "
        f"{_counted(metadata[f'num_{split}_documents'], 'document')}, "
        f"{_counted(metadata[f'{split}_shards'], 'shard')}"
        for split in ("train", "val")
    ]
    lines.append(f"split       {metadata['split_rule']}")
    for key, text in (
        ("skipped_empty_documents", "empty documents left out"),
        ("skipped_undecodable_files", "files that are not UTF-8 left out"),
    ):
        if metadata[key]:
            lines.append(f"note        {metadata[key]:,} {text}")
    lines.append(f"checked     {_checked(metadata)}")
    lines.append(f"next        mypt-fast train --config CONFIG --dataset_dir {out_dir}")
    lines.append(_duplicates(metadata))
    return "\n".join(lines)


def _counted(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def _checked(metadata: dict[str, Any]) -> str:
    texts = _counted(metadata["verified_pieces"], "sampled text")
    if metadata["tokenization"] == "gpt2" and not metadata["options"]["mypt_clean"]:
        return f"{texts}: tiktoken gives the same tokens, and they decode"
    return f"{texts}: the first tokens decode to the same"


def _duplicates(metadata: dict[str, Any]) -> str:
    total, repeated = metadata["num_documents"], metadata["duplicate_documents"]
    if metadata["duplicates_dropped"]:
        done = ", dropped with --dedup"
    else:
        done = ", kept; --dedup drops them" if repeated else ""
    share = 100 * repeated / max(total, 1)
    return f"documents: {total:,}, exact duplicates: {repeated:,} ({share:.1f} %){done}"
