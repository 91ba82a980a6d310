"""Compare every byte of a bundle with what was saved, and name what differs."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mypt_fast.checkpoint.manifest import (
    TENSOR_FILES,
    is_whole_archive,
    listed_files,
    matches,
    read_info,
    read_member,
)
from mypt_fast.checkpoint.tensors import load, tensor_entries
from mypt_fast.errors import IntegrityError, MyptError


@dataclass
class Report:
    """What was compared, and what differs: empty for a bundle that is what was saved."""

    lines: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    n_bytes: int = 0


def verify(path: Path) -> Report:
    """Hash every file that the manifest lists, and every tensor in them.

    A bundle without manifest is compared with the CRC-32 of its own archives.

    Raises:
        IntegrityError: if the manifest itself cannot be used.
    """
    report = Report()
    if not (path / "manifest.json").is_file():
        _without_manifest(path, report)
        return report
    try:
        manifest = read_member(path / "manifest.json")
    except MyptError as e:
        raise IntegrityError(str(e), cure="delete it to load the bundle unverified") from e
    count = 0
    for name, entry in listed_files(path, manifest).items():
        member = path / name
        if not member.is_file():
            report.problems.append(f"{name} is missing")
            continue
        report.n_bytes += member.stat().st_size
        listed = manifest["tensors"].get(name, {})
        if matches(member, entry):
            names = _differing(member, listed) if listed else []
            count += len(listed)
        elif name in TENSOR_FILES:
            names = _differing(member, listed) or ["between its tensors"]
        else:
            names = ["its hash"]
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            report.problems.append(f"{name} differs in {', '.join(names[:5])}{more}")
    report.lines.append(f"{len(manifest['files'])} files and {count} tensors have their hashes")
    return report


def _differing(path: Path, listed: dict[str, Any]) -> list[str]:
    """Names of the tensors that are not what was saved; all bytes around them if unreadable."""
    try:
        found = tensor_entries(load(path))
    except MyptError:
        return ["its structure: no tensor can be read"]
    return [f"tensor {name}" for name in {**listed, **found} if listed.get(name) != found.get(name)]


def _without_manifest(path: Path, report: Report) -> None:
    checked = []
    for name in TENSOR_FILES:
        member = path / name
        if not member.is_file():
            continue
        report.n_bytes += member.stat().st_size
        checked.append(name)
        if not is_whole_archive(member):
            report.problems.append(f"{name} differs from its own CRC-32")
            continue
        try:
            load(member)
        except MyptError as e:
            report.problems.append(f"{name}: {e}")
    try:
        checked += [f"{name}.json" for name in read_info(path)]
    except MyptError as e:
        report.problems.append(str(e))
    report.lines.append(
        f"no manifest.json: {', '.join(checked)} could be read, tensors by their archive's own "
        "CRC-32; whether they are what was saved, nothing says"
    )
