"""Files of tokens for tests: written with struct and NumPy, not with the code under test."""

import json
import struct

import numpy as np
import xxhash


def native_bytes(
    tokens, ends=(), *, width=2, mask=None, segments=None, vocab_size=0, eot_id=-1, max_token=None
):
    """A native shard by the description of its layout; the tokenizer's hash is zeros."""
    payload = np.asarray(tokens, f"<u{width}").tobytes()
    planes = [np.asarray(p, "u1").tobytes() if p is not None else None for p in (mask, segments)]
    hashes = [xxhash.xxh3_64_digest(p) if p is not None else bytes(8) for p in planes]
    flags = sum(bit for bit, p in zip((1, 2), planes, strict=True) if p is not None)
    if max_token is None:
        max_token = max(map(int, tokens), default=0)
    head = struct.pack(
        "<8sIIIIQQQqQ32s16s8s8s", b"MYPTSHD1", 1, 0x01020304, width, flags, len(tokens), len(ends),
        vocab_size, eot_id, max_token, bytes(32), xxhash.xxh3_128_digest(payload), *hashes,
    ).ljust(4088, b"\0")  # fmt: skip
    head += struct.pack("<Q", xxhash.xxh3_64_intdigest(head))
    parts = [p + bytes(-len(p) % 8) for p in (payload, *planes) if p is not None]
    tables = np.asarray(ends, "<u8").tobytes()
    blocks = [payload[i : i + (1 << 20)] for i in range(0, len(payload), 1 << 20)]
    tables += b"".join(struct.pack("<Q", xxhash.xxh3_64_intdigest(b)) for b in blocks)
    size = 4096 + sum(map(len, parts)) + len(tables) + 24
    footer = struct.pack("<8sQQ", b"MYPTEND1", size, xxhash.xxh3_64_intdigest(tables))
    return head + b"".join(parts) + tables + footer


def llmc_bytes(tokens, width=2):
    magic, version = {2: (20240520, 1), 4: (20240801, 7)}[width]
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens)
    return header.tobytes() + np.asarray(tokens, f"<u{width}").tobytes()


def megatron_bytes(documents, dtype="<u2"):
    """The two files, .bin and .idx, of a list of documents, one sequence each."""
    code = {"<u2": 8, "<i4": 4, "<i8": 5}[dtype]
    lengths = np.array([len(d) for d in documents], "<i4")
    pointers = (np.cumsum(lengths, dtype="<i8") - lengths) * np.dtype(dtype).itemsize
    entries = np.arange(len(documents) + 1, dtype="<i8")
    head = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, code, len(documents), len(entries))
    index = head + lengths.tobytes() + pointers.astype("<i8").tobytes() + entries.tobytes()
    tokens = np.concatenate([np.asarray(d, dtype) for d in documents] or [np.empty(0, dtype)])
    return tokens.tobytes(), index


def write_episodes(folder, tokens, spans, *, mask=None, weights=None, segments=None):
    folder.mkdir(parents=True, exist_ok=True)
    np.asarray(tokens, "<u4").tofile(folder / "tokens.bin")
    np.asarray(spans, "<u8").reshape(-1, 2).tofile(folder / "episodes.idx")
    for name, values, dtype in (
        ("mask.bin", mask, "u1"),
        ("mask_weighted.bin", weights, "<f4"),
        ("segment_ids.bin", segments, "u1"),
    ):
        if values is not None:
            np.asarray(values, dtype).tofile(folder / name)
    return folder


def write_file(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def describe(folder, **metadata):
    (folder / "dataset_metadata.json").write_text(json.dumps(metadata))
    return folder
