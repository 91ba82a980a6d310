"""Compiled code is kept where nobody else can put any."""

import os
import stat
from pathlib import Path

import pytest

from mypt_fast import cache
from mypt_fast.cli import main

NAMES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


@pytest.fixture
def home(monkeypatch, tmp_path: Path) -> Path:
    """A cache folder that is not there yet, and no choice of the user's."""
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tmp_path.chmod(0o700)
    return tmp_path / "cache"


def kept() -> list[str]:
    return [os.environ[name] for name in NAMES if name in os.environ]


def test_what_is_compiled_is_kept_in_a_folder_of_our_own(home) -> None:
    assert cache.keep_compiled() is None
    folder = home / "mypt_fast/compiled"
    assert kept() == [str(folder / "inductor"), str(folder / "triton")]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert cache.keep_compiled() is None  # and it is found again


def test_a_users_own_choice_stays(home, monkeypatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", "/mine")
    assert cache.keep_compiled() is None
    assert kept() == [str(home / "mypt_fast/compiled/inductor"), "/mine"]
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/mine too")
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "untouched"))
    assert cache.keep_compiled() is None
    assert not (home / "untouched").exists()


@pytest.mark.parametrize("mode", [0o770, 0o702, 0o1777])
@pytest.mark.parametrize("which", [".", "mypt_fast", "mypt_fast/compiled"])
def test_a_folder_that_others_can_write_in_is_not_used(home, which, mode) -> None:
    (home / "mypt_fast/compiled").mkdir(parents=True)
    for folder in (home, home / "mypt_fast", home / "mypt_fast/compiled"):
        folder.chmod(0o700)
    (home / which).chmod(mode)
    why = cache.keep_compiled()
    if mode == 0o1777 and which != "mypt_fast/compiled":  # what is ours cannot be renamed there
        assert why is None
        return
    assert why == f"others can write in {(home / which).resolve()}; `chmod go-w` shuts it"
    assert kept() == []


def test_a_link_to_where_others_can_write_is_not_followed_blindly(home, tmp_path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    (home / "mypt_fast").mkdir(parents=True, mode=0o700)
    home.chmod(0o700)
    (home / "mypt_fast").chmod(0o700)
    (home / "mypt_fast/compiled").symlink_to(tmp_path / "open")
    assert (
        cache.keep_compiled()
        == f"others can write in {(tmp_path / 'open').resolve()}; `chmod go-w` shuts it"
    )


def test_a_folder_of_somebody_else_is_not_used(home, monkeypatch) -> None:
    assert cache.keep_compiled() is None
    for name in NAMES:
        monkeypatch.delenv(name)
    me = os.getuid()
    monkeypatch.setattr(cache.os, "getuid", lambda: me + 1)
    assert "others can write in" in (cache.keep_compiled() or "")
    assert kept() == []


def test_where_none_can_be_made_one_line_says_so(home, tmp_path, capsys, monkeypatch) -> None:
    home.write_text("a file")
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--model_name", "../x"]) == 2
    first = capsys.readouterr().err.splitlines()[0]
    assert first.startswith("note: what is compiled is not kept in the cache folder: ")
    assert kept() == []
