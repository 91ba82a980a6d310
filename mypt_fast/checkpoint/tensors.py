"""Read the files that torch.save writes, and hash their tensors, without running a pickle.

The archive is a zip of stored records: `data.pkl`, a pickle that names tensors, and one record of
raw bytes for each storage. A machine of some twenty opcodes, which knows no call but "make a
tensor", reads the pickle: there is nothing to execute, every size is compared with the record it
speaks of before memory is taken, and dict keys are strings or integers.
"""

import math
import os
import pickletools
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from mypt_fast.errors import CheckpointError, IntegrityError

MAX_PICKLE_BYTES = 16 << 20  # a 1.5B model with its moments names its tensors in 0.4 MiB
MAX_DIMS = 16
MAX_DEPTH, MAX_NODES = 32, 1 << 20  # optimizer state is four deep
DTYPE_OF = {
    "FloatStorage": torch.float32, "DoubleStorage": torch.float64, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}  # fmt: skip


class _Refused(Exception):
    """What is not in a tensor file of torch.save."""


class _Name:
    """A global that the file names; never imported."""

    def __init__(self, text: str) -> None:
        self.text = text


class _Fields(dict[str, Any]):
    """The attributes of a config object, as a dict: its class is never looked for."""


def load(path: Path, *, values: bool = True) -> Any:
    """Read a tensor file: dicts, lists, numbers, strings and CPU tensors.

    An object of a class named GPTConfig, which some old files hold, is read as a dict.

    Args:
        path: the file.
        values: read the tensors' bytes; without, they are on the meta device.

    Raises:
        CheckpointError: if it is missing.
        IntegrityError: for anything that torch.save does not write for such content.
    """
    try:
        with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
            records = _records(archive, path.stat().st_size)
            head = next((n[:-8] for n in records if n.endswith("data.pkl")), None)
            if head is None:
                raise _Refused("no data.pkl in it")
            if head + "byteorder" in records and archive.read(head + "byteorder") != b"little":
                raise _Refused("its numbers are not little-endian")
            return _bounded(_Reader(file, archive, records, head, values).run())
    except FileNotFoundError as e:
        raise CheckpointError(f"{path} is missing") from e
    except PermissionError as e:
        raise CheckpointError(f"cannot read {path}", e.strerror or str(e)) from e
    except Exception as e:  # junk bytes surface as any of a dozen types, struct.error among them
        lines = str(e).splitlines()
        raise IntegrityError(
            f"cannot read {path}",
            lines[0][:150] if lines else type(e).__name__,
            f"restore it, or resume from {path.parent.name}_gold if it exists",
        ) from e


def _records(archive: zipfile.ZipFile, size: int) -> dict[str, zipfile.ZipInfo]:
    infos = archive.infolist()
    if any(i.compress_type != zipfile.ZIP_STORED or i.file_size != i.compress_size for i in infos):
        raise _Refused("its records are compressed, which torch.save does not do")
    if sum(i.file_size for i in infos) > size:
        raise _Refused("its records claim more bytes than the file has")
    if len({i.filename for i in infos}) != len(infos):
        raise _Refused("it names a record twice")
    return {i.filename: i for i in infos}


def _bounded(content: Any) -> Any:
    """Refuse what contains itself, or a few bytes that stand for a billion objects."""
    left, seen = [(content, 0)], 0
    while left:
        value, depth = left.pop()
        seen += 1
        if depth > MAX_DEPTH or seen > MAX_NODES:
            raise _Refused("it is nested too deeply")
        if isinstance(value, _Name):
            raise _Refused(f"it holds {value.text[:80]}, which is no value")
        if isinstance(value, (dict, list, tuple)):
            inner = value.values() if isinstance(value, dict) else value
            left += [(item, depth + 1) for item in inner]
    return content


class _Reader:
    """The machine; `run` returns what data.pkl describes."""

    def __init__(
        self,
        file: Any,
        archive: zipfile.ZipFile,
        records: dict[str, zipfile.ZipInfo],
        head: str,
        values: bool,
    ) -> None:
        self.file, self.archive, self.records, self.head = file, archive, records, head
        self.values = values
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, Tensor] = {}

    def run(self) -> Any:
        info = self.records[self.head + "data.pkl"]
        if info.file_size > MAX_PICKLE_BYTES:
            raise _Refused(f"data.pkl has {info.file_size} bytes, more than any checkpoint's")
        for opcode, argument, _ in pickletools.genops(self.archive.read(info)):
            if opcode.name == "STOP":
                return self.stack.pop()
            step = getattr(self, "_" + opcode.name.lower(), None)
            if opcode.name in PUSHES:
                self.stack.append(argument)
            elif step is not None and opcode.name in OPCODES:
                step(argument)
            else:
                raise _Refused(f"pickle opcode {opcode.name}, which no checkpoint needs")
        raise _Refused("data.pkl has no end")

    def _proto(self, argument: Any) -> None:
        if argument != 2:  # what torch.save has written since it writes archives
            raise _Refused(f"pickle protocol {argument}")

    def _mark(self, argument: Any) -> None:
        self.marks.append(len(self.stack))

    def _since_mark(self) -> list[Any]:
        at = self.marks.pop()
        items, self.stack[at:] = self.stack[at:], []
        return items

    def _none(self, argument: Any) -> None:
        self.stack.append(None)

    def _newtrue(self, argument: Any) -> None:
        self.stack.append(True)

    def _newfalse(self, argument: Any) -> None:
        self.stack.append(False)

    def _empty_dict(self, argument: Any) -> None:
        self.stack.append({})

    def _empty_list(self, argument: Any) -> None:
        self.stack.append([])

    def _empty_tuple(self, argument: Any) -> None:
        self.stack.append(())

    def _tuple(self, argument: Any) -> None:
        self.stack.append(tuple(self._since_mark()))

    def _tuple1(self, argument: Any) -> None:
        self.stack[-1:] = [tuple(self.stack[-1:])]

    def _tuple2(self, argument: Any) -> None:
        self.stack[-2:] = [tuple(self.stack[-2:])]

    def _tuple3(self, argument: Any) -> None:
        self.stack[-3:] = [tuple(self.stack[-3:])]

    def _append(self, argument: Any) -> None:
        item = self.stack.pop()
        _as(list, self.stack[-1]).append(item)

    def _appends(self, argument: Any) -> None:
        items = self._since_mark()
        _as(list, self.stack[-1]).extend(items)

    def _setitem(self, argument: Any) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._fill([key, value])

    def _setitems(self, argument: Any) -> None:
        self._fill(self._since_mark())

    def _fill(self, items: list[Any]) -> None:
        target = _as(dict, self.stack[-1])
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) not in (str, int):  # a nested tuple may take for ever to hash
                raise _Refused(f"a dict key of type {type(key).__name__}")
            target[key] = value

    def _binput(self, argument: Any) -> None:
        self.memo[argument] = self.stack[-1]

    def _long_binput(self, argument: Any) -> None:
        self.memo[argument] = self.stack[-1]

    def _binget(self, argument: Any) -> None:
        self.stack.append(self.memo[argument])

    def _long_binget(self, argument: Any) -> None:
        self.stack.append(self.memo[argument])

    def _global(self, argument: Any) -> None:
        self.stack.append(_Name(str(argument).replace(" ", ".")))

    def _newobj(self, argument: Any) -> None:
        values, name = _as(tuple, self.stack.pop()), _as(_Name, self.stack.pop()).text
        if values or name.rpartition(".")[2] != "GPTConfig":
            raise _Refused(f"it asks to make a {name[:80]}")
        self.stack.append(_Fields())

    def _build(self, argument: Any) -> None:
        state = self.stack.pop()
        if isinstance(self.stack[-1], _Fields):
            self.stack[-1].update(_as(dict, state))
        else:  # a state_dict's _metadata: versions of modules, not of ours
            _as(OrderedDict, self.stack[-1])

    def _binpersid(self, argument: Any) -> None:
        kind, name, key, _, count = _as(tuple, self.stack.pop())
        dtype = DTYPE_OF.get(_as(_Name, name).text.removeprefix("torch."))
        if kind != "storage" or dtype is None:
            raise _Refused(f"a storage of kind {name.text}")
        self.stack.append(self._storage(_as(str, key), dtype, _as(int, count)))

    def _storage(self, key: str, dtype: torch.dtype, count: int) -> Tensor:
        if key not in self.storages:
            info = self.records[f"{self.head}data/{key}"]
            if info.file_size != count * dtype.itemsize:
                raise _Refused(
                    f"storage {key} claims {count} values and has {info.file_size} bytes"
                )
            if self.values:
                raw = torch.empty(info.file_size, dtype=torch.uint8)
                self._fill_from(info, raw.numpy().data, key)
                self.storages[key] = raw.view(dtype)
            else:
                self.storages[key] = torch.empty(count, dtype=dtype, device="meta")
        return self.storages[key]

    def _fill_from(self, info: zipfile.ZipInfo, target: memoryview, key: str) -> None:
        """Read a stored record past zipfile, which would hash every byte once more."""
        self.file.seek(info.header_offset)
        head = self.file.read(30)
        if len(head) < 30 or head[:4] != b"PK\x03\x04":
            raise _Refused(f"storage {key} has no header")
        names = int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
        self.file.seek(names, os.SEEK_CUR)
        got = 0
        while got < len(target):
            more = self.file.readinto(target[got:])
            if not more:
                raise _Refused(f"storage {key} ends early")
            got += more

    def _reduce(self, argument: Any) -> None:
        values, name = _as(tuple, self.stack.pop()), _as(_Name, self.stack.pop()).text
        if name == "collections.OrderedDict" and values == ():
            self.stack.append(OrderedDict())
        elif name == "torch._utils._rebuild_tensor_v2":
            self.stack.append(_tensor(*values[:4]))
        elif name == "torch._utils._rebuild_parameter":
            self.stack.append(_as(Tensor, values[0]))
        else:
            raise _Refused(f"it asks to call {name[:80]}")


PUSHES = {"BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"}
OPCODES = {
    "PROTO", "MARK", "NONE", "NEWTRUE", "NEWFALSE", "EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE",
    "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "APPEND", "APPENDS", "SETITEM", "SETITEMS", "BINPUT",
    "LONG_BINPUT", "BINGET", "LONG_BINGET", "GLOBAL", "NEWOBJ", "BUILD", "BINPERSID",
    "REDUCE",
}  # fmt: skip


def _as(kind: Any, value: Any) -> Any:
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise _Refused(f"a {type(value).__name__} where a {kind.__name__} belongs")
    return value


def _tensor(storage: Any, offset: Any, size: Any, stride: Any) -> Tensor:
    """View a storage; every element lies inside it, and the view is no larger than it."""
    storage = _as(Tensor, storage)
    numbers = [_as(int, offset), *_as(tuple, size), *_as(tuple, stride)]
    if any(type(n) is not int or not 0 <= n < 1 << 62 for n in numbers):
        raise _Refused("a negative or huge size")
    if len(size) != len(stride) or len(size) > MAX_DIMS:
        raise _Refused(f"{len(size)} sizes and {len(stride)} strides")
    count = math.prod(size)
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) if count else 0
    if count > storage.numel() or (count and last >= storage.numel()):
        raise _Refused(f"a tensor of {count} values in a storage of {storage.numel()}")
    return torch.as_strided(storage, size, stride, offset if count else 0)


def tensor_entries(content: Any) -> dict[str, dict[str, Any]]:
    """Hash every tensor in nested dicts: dtype, shape and 128 bits by dotted name."""
    return {
        name: {
            "dtype": str(value.dtype).removeprefix("torch."),
            "shape": list(value.shape),
            "xxh3_128": _hash(value),
        }
        for name, value in _walk(content, "")
    }


def _walk(content: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(content, Tensor):
        yield prefix.removeprefix("state_dict."), content
    elif isinstance(content, Mapping):
        for key, value in content.items():
            yield from _walk(value, f"{prefix}.{key}" if prefix else str(key))


def _hash(value: Tensor) -> str:
    data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return xxhash.xxh3_128(data.data).hexdigest()
