"""While a script runs, the name `core` means `mypt_fast.core`.

The very same module objects answer to both names, so a class is never defined twice. A submodule
that this package does not have comes from the user's own `core/` folder, whose `__init__.py` is
not executed: it would load the engine that is being replaced.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import stat
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path

ALIAS, PACKAGE = "core", "mypt_fast.core"


class CoreFinder(importlib.abc.MetaPathFinder):
    """Finds `core` and what is under it.

    Args:
        near: folders that may hold the user's `core/`, asked before the entries of sys.path.
    """

    def __init__(self, near: Sequence[Path]) -> None:
        self.near = [str(folder) for folder in near]

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None = None,
        target: types.ModuleType | None = None,
    ) -> importlib.machinery.ModuleSpec | None:
        """Return the spec of `core`, of one of its submodules by either name, or None."""
        if fullname == ALIAS:
            return _alias_spec(fullname, PACKAGE)
        for prefix, other in ((ALIAS + ".", PACKAGE + "."), (PACKAGE + ".", ALIAS + ".")):
            if fullname.startswith(prefix):
                name = fullname.removeprefix(prefix)
                return self._submodule(fullname, name, other + name)
        return None

    def _submodule(
        self, fullname: str, name: str, other: str
    ) -> importlib.machinery.ModuleSpec | None:
        is_ours, is_alias = _has(name.split(".")[0]), fullname.startswith(ALIAS + ".")
        if is_ours:
            return _alias_spec(fullname, other) if is_alias else None
        if "." in name:  # below the user's own package, which knows its path
            is_there = not is_alias and importlib.util.find_spec(other) is not None
            return _alias_spec(fullname, other) if is_there else None
        found = importlib.machinery.PathFinder.find_spec(f"{ALIAS}.{name}", self.folders())
        return found if is_alias or found is None else _alias_spec(fullname, other)

    def folders(self) -> list[str]:
        """The user's `core` folders, nearest first; sys.path counts as it is at this moment."""
        bases = [*self.near, *(entry or os.getcwd() for entry in sys.path)]
        folders = dict.fromkeys(os.path.join(base, ALIAS) for base in bases)
        ours = os.path.realpath(_ours())
        return [f for f in folders if os.path.isdir(f) and os.path.realpath(f) != ours]


class _Alias(importlib.abc.Loader):
    """Loads a module under a second name: the object is the one of the first."""

    def __init__(self, target: str) -> None:
        self.target = target
        self.spec: importlib.machinery.ModuleSpec | None = None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        """Return the module that `target` names."""
        module = importlib.import_module(self.target)
        self.spec = module.__spec__
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        """Leave the module as it is: the import system has just put this spec into it."""
        module.__spec__ = self.spec


def _alias_spec(fullname: str, target: str) -> importlib.machinery.ModuleSpec:
    return importlib.machinery.ModuleSpec(fullname, _Alias(target))


def _ours() -> str:
    return os.path.dirname(str(importlib.import_module(PACKAGE).__file__))


def _has(name: str) -> bool:
    found = importlib.machinery.PathFinder.find_spec(f"{PACKAGE}.{name}", [_ours()])
    return found is not None


def install(near: Sequence[Path]) -> None:
    """Let `core` mean `mypt_fast.core` until the process ends.

    What a script leaves running, its threads and exit handlers, may still import.
    """
    package = importlib.import_module(PACKAGE)
    for name, module in list(sys.modules.items()):
        # of another script's folder, under either name
        is_theirs = name.startswith(PACKAGE + ".") and not _has(name.split(".")[2])
        if is_theirs and getattr(package, name.split(".")[2], None) is module:
            delattr(package, name.split(".")[2])
        if is_theirs or name == ALIAS or name.startswith(ALIAS + "."):
            del sys.modules[name]
    sys.modules[ALIAS] = package
    sys.meta_path[:] = [f for f in sys.meta_path if not isinstance(f, CoreFinder)]
    sys.meta_path.insert(0, CoreFinder(near))


def own_and_parents(folder: Path) -> list[Path]:
    """A folder and those above it, without those that anybody may write to."""
    return [folder, *(p for p in folder.parents if not _is_anybodys(p))]


def _is_anybodys(folder: Path) -> bool:
    try:
        return bool(folder.stat().st_mode & stat.S_IWOTH)
    except OSError:
        return True


def project_root(starts: Sequence[Path], is_root: Callable[[Path], bool]) -> Path | None:
    """The first folder among the starts and those above them that is a project's root."""
    folders = (folder for start in starts for folder in own_and_parents(start))
    return next((folder for folder in folders if is_root(folder)), None)
