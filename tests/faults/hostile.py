"""Files that would run code, lie about sizes or take memory without end: name and bytes of each.

Run as `python hostile.py FOLDER`: every one is read in place of a bundle's model.pt and
optimizer.pt, in a process that would notice anything executed; prints one JSON object.
"""

import io
import json
import os
import pickle
import resource
import struct
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

CALLS = [
    ("os", "system"), ("posix", "system"), ("os", "execvp"), ("os", "remove"), ("os", "mkdir"),
    ("subprocess", "Popen"), ("subprocess", "check_output"), ("builtins", "eval"),
    ("builtins", "exec"), ("builtins", "__import__"), ("builtins", "open"),
    ("builtins", "getattr"), ("builtins", "setattr"), ("builtins", "compile"),
    ("builtins", "bytearray"), ("builtins", "print"), ("__builtin__", "eval"),
    ("importlib", "import_module"), ("runpy", "run_path"), ("pty", "spawn"), ("shutil", "rmtree"),
    ("pathlib", "Path.touch"), ("ctypes", "CDLL"), ("pickle", "loads"), ("marshal", "loads"),
    ("types", "FunctionType"), ("functools", "partial"), ("operator", "attrgetter"),
    ("webbrowser", "open"), ("timeit", "timeit"), ("pdb", "run"), ("code", "interact"),
    ("logging.config", "dictConfig"), ("torch", "load"), ("torch.hub", "load"),
    ("torch.jit", "load"), ("torch", "zeros"), ("torch", "Tensor"),
    ("torch.serialization", "load"), ("torch.storage", "UntypedStorage"),
    ("torch._utils", "_rebuild_sparse_tensor"),
    ("torch._utils", "_rebuild_device_tensor_from_numpy"),
    ("torch._tensor", "_rebuild_from_type_v2"), ("numpy", "load"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("_codecs", "encode"), ("collections", "Counter"),
]  # fmt: skip
CANARY = b"touch executed"
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"


def text(word: str | bytes) -> bytes:
    data = word.encode() if isinstance(word, str) else word
    return b"X" + struct.pack("<I", len(data)) + data


def number(n: int) -> bytes:
    data = n.to_bytes(n.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def tensor(size, stride, offset=0, count=4, key="0", kind="FloatStorage") -> bytes:
    def shape(values) -> bytes:
        return b"(" + b"".join(number(v) for v in values) + b"t"

    storage = b"(" + text("storage") + f"ctorch\n{kind}\n".encode() + text(key) + text("cpu")
    storage += number(count) + b"tQ"
    return (
        REBUILD + b"(" + storage + number(offset) + shape(size) + shape(stride)
        + b"\x89ccollections\nOrderedDict\n)RtR"
    )  # fmt: skip


def model(inner: bytes) -> bytes:
    """A pickle of {"state_dict": {"w": <inner>}, "param_groups": []}."""
    return (
        b"\x80\x02}(" + text("state_dict") + b"}" + text("w") + inner + b"s"
        + text("param_groups") + b"]" + b"u."
    )  # fmt: skip


def archive(data: bytes, *, compress=zipfile.ZIP_STORED, extra=()) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compress) as z:
        z.writestr("archive/data.pkl", data)
        z.writestr("archive/data/0", struct.pack("<4f", 1, 2, 3, 4))
        for name, content in extra:
            z.writestr(name, content)
    return out.getvalue()


def pickles() -> Iterator[tuple[str, bytes]]:
    """Pickles that would call something or that no checkpoint holds."""
    for module, name in CALLS:
        where = f"c{module}\n{name}\n".encode()
        size = (b"(" + number(1 << 40) + b"t") if name in ("bytearray", "zeros", "Tensor") else None
        yield f"call {module}.{name}", model(where + (size or b"(" + text(CANARY) + b"t") + b"R")
    system = b"\x8c\x05posix\x8c\x06system\x93"
    call = text(CANARY) + b"\x85"
    yield "STACK_GLOBAL", model(system + call + b"R")
    yield "INST", model(b"(" + text(CANARY) + b"iposix\nsystem\n")
    yield "OBJ", model(b"(cposix\nsystem\n" + text(CANARY) + b"o")
    yield "NEWOBJ", model(b"cposix\nsystem\n" + call + b"\x81")
    yield "NEWOBJ_EX", model(b"cposix\nsystem\n" + call + b"}\x92")
    yield "EXT1", model(b"\x82\x01")
    yield "PERSID", model(b"Pposix.system\n")
    yield "BUILD on a global", model(b"cposix\nsystem\n}" + text("x") + number(1) + b"sb")
    yield "SETITEM on a tensor", model(tensor([4], [1]) + text("x") + number(1) + b"s")
    yield "SETITEMS on a list", model(b"](" + text("x") + number(1) + b"u")
    yield "APPEND to a tensor", model(tensor([4], [1]) + number(1) + b"a")
    yield "a global as a value", model(b"cposix\nsystem\n")
    yield "unpickled inside", model(b"c_pickle\nloads\n" + text(pickle.dumps(1)) + b"\x85R")
    yield "2^62 values", model(tensor([1 << 62], [1]))
    yield "2^31 x 2^31 x 4", model(tensor([1 << 31, 1 << 31, 4], [4, 4, 1]))
    yield "stride 0 makes 2^40", model(tensor([1 << 40], [0]))
    yield "a view larger than its storage", model(tensor([5], [0]))
    yield "beyond the storage", model(tensor([4], [2]))
    yield "offset beyond", model(tensor([4], [1], offset=1))
    yield "negative offset", model(tensor([2], [1], offset=-2))
    yield "negative stride", model(tensor([2], [-1], offset=2))
    yield "negative size", model(tensor([-4], [1]))
    yield "storage claims more", model(tensor([1000], [1], count=1000))
    yield "storage claims 2^60", model(tensor([4], [1], count=1 << 60))
    yield "storage claims less", model(tensor([2], [1], count=2))
    yield "storage of another type", model(tensor([4], [1], kind="DoubleStorage"))
    yield "untyped storage", model(tensor([16], [1], count=16, kind="UntypedStorage"))
    yield "storage out of the archive", model(tensor([4], [1], key="../../../etc/passwd"))
    yield "a thousand dimensions", model(tensor([1] * 200, [1] * 200))
    yield "half a million lists deep", model(b"]" * 500_000 + b"a" * 499_999)
    yield "contains itself", b"\x80\x02}q\x00" + text("state_dict") + b"h\x00s."
    yield "list contains itself", model(b"]q\x00h\x00a")
    doubled = b")" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(60))
    yield "2^60 tuples", model(doubled)
    yield "2^60 tuples as a key", model(b"}" + doubled + number(1) + b"s")
    yield "memo of 2^31", model(b"]r\xff\xff\xff\x7f0")
    yield "a string of 4 GiB", b"\x80\x02X\xff\xff\xff\xffabc"
    yield "bytes of 2^62", b"\x80\x04\x8e" + struct.pack("<Q", 1 << 62) + b"abc"
    yield "a number of 2 GiB", b"\x80\x02\x8b\xff\xff\xff\x7fabc"
    yield "a frame of 2^62", b"\x80\x04\x95" + struct.pack("<Q", 1 << 62) + b"."
    yield "stack underflow", b"\x80\x02R."
    yield "no end", b"\x80\x02}"
    yield "empty", b""
    yield "a future protocol", b"\x80\xff}."


def files() -> Iterator[tuple[str, bytes]]:
    """Whole files."""
    for name, data in pickles():
        yield name, archive(data)
    good = model(tensor([4], [1]))
    yield "a zip bomb", archive(good, compress=zipfile.ZIP_DEFLATED,
                                extra=[("archive/data/1", bytes(200 << 20))])  # fmt: skip
    yield (
        "a bomb of a pickle",
        archive(b"\x80\x02" + b"]0" * (20 << 20), compress=zipfile.ZIP_DEFLATED),
    )
    yield "a pickle of 40 MiB", archive(b"\x80\x02" + b"]0" * (20 << 20) + b"}.")
    yield "TorchScript", archive(b"\x80\x02cposix\nsystem\n" + text(CANARY) + b"\x85R.",
                                 extra=[("archive/constants.pkl", b"\x80\x02.")])  # fmt: skip
    yield "a bare pickle", pickle.dumps(Evil(), 2)
    yield "an old torch file", b"\x80\x02" + number(0x1950A86A20F9469CFC6C) + b"." + model(b")")
    yield "no pickle in it", archive(good).replace(b"data.pkl", b"data.pkx")
    lied = bytearray(archive(good))
    at = lied.rindex(b"PK\x01\x02")
    lied[at + 20 : at + 28] = struct.pack("<II", 0xFFFFFFF0, 0xFFFFFFF0)
    yield "a record of 4 GiB", bytes(lied)
    twice = bytearray(archive(good, extra=[("archive/data/1", bytes(16))]))
    yield "a record twice", bytes(twice.replace(b"data/1", b"data/0"))
    yield "not an archive", b"\x00" * 4096
    yield "half an archive", archive(good)[:-30]


class Evil:
    def __reduce__(self):
        return (os.system, (CANARY.decode(),))


def main() -> None:
    """Try them all; one good file shows that the harness would let a good one through."""
    from mypt_fast.checkpoint import bundle
    from mypt_fast.errors import IntegrityError

    os.chdir(sys.argv[1])
    folder, results = Path("m"), {}
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.pt").write_bytes(archive(model(tensor([2, 2], [2, 1]))))
    assert bundle.read(folder, optimizer=False).state_dict["w"].tolist() == [[1, 2], [3, 4]]
    cases = list(files())
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name, data in cases:
        for member in ("model.pt", "optimizer.pt"):
            (folder / "model.pt").write_bytes(archive(model(tensor([2, 2], [2, 1]))))
            (folder / member).write_bytes(data)
            try:
                bundle.read(folder)
                results[f"{name} in {member}"] = "read"
            except IntegrityError as e:
                results[f"{name} in {member}"] = "" if str(e).isprintable() else repr(str(e))
            except BaseException as e:
                results[f"{name} in {member}"] = f"{type(e).__name__}: {e}"
            (folder / member).unlink()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held
    print(json.dumps({
        "cases": len(cases), "largest": max(len(d) for _, d in cases), "grown_kib": grown,
        "wrong": {k: v for k, v in results.items() if v}, "left": sorted(os.listdir(".")),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
