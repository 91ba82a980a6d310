"""`mypt-fast run`: scripts see what plain Python would show them, and `core` is this engine."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from mypt_fast.cli import cmd_run, main

ROOT = Path(__file__).parent.parent.parent
REPORT = """\
import json, sys
print(json.dumps({
    "argv": sys.argv, "name": __name__, "file": __file__, "path0": sys.path[0],
    "path": sys.path, "main": sys.modules["__main__"].__dict__ is globals(),
    "spec": __spec__ is None,
}))
"""


@pytest.fixture
def project(tmp_path):
    """A folder of the user's: scripts, and a core/ whose engine must not be executed."""

    def write(files):
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(textwrap.dedent(text), "utf-8")
        return tmp_path

    return write


def start(words, cwd, mypt=True, env=None):
    """Run a command line in a fresh interpreter: with `mypt_fast run`, or as plain Python."""
    before = [sys.executable, *(["-m", "mypt_fast", "run"] if mypt else [])]
    return subprocess.run(
        [*before, *words], capture_output=True, text=True, cwd=cwd, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), **(env or {})},
    )  # fmt: skip


def shown(words, cwd, **options):
    done = start(words, cwd, **options)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.parametrize("script", ["report.py", "./sub/report.py", "sub/../sub/report.py"])
def test_a_script_finds_what_plain_python_gives_it(project, script):
    folder = project({"report.py": REPORT, "sub/report.py": REPORT})
    words = [script, "--flag-with-dashes", "a b", "--config=x", "--", "-m", ""]
    ours, plain = (json.loads(shown(words, folder, mypt=mypt)) for mypt in (True, False))
    for key in ("argv", "name", "file", "path0", "main", "spec"):
        assert ours[key] == plain[key], key
    assert ours["argv"][1:] == words[1:]
    # everything plain Python has is there, in its order
    assert [p for p in ours["path"] if p in plain["path"]] == plain["path"]


def test_the_folder_of_a_linked_script_is_that_of_the_file(project):
    folder = project({"real/report.py": REPORT})
    (folder / "link.py").symlink_to(folder / "real/report.py")
    ours, plain = (json.loads(shown(["link.py"], folder, mypt=m)) for m in (True, False))
    assert (ours["path0"], ours["file"]) == (plain["path0"], plain["file"])


def test_the_installed_command_leaves_no_trace_of_its_folder(project):
    """As `mypt-fast` in a bin folder: Python puts that folder first on sys.path."""
    folder = project({
        "bin/mypt-fast": "import sys\nfrom mypt_fast.cli import main\nsys.exit(main())",
        "sub/report.py": REPORT,
    })  # fmt: skip
    words = [str(folder / "bin/mypt-fast"), "run", "sub/report.py", "x"]
    ours = json.loads(shown(words, folder, mypt=False))
    plain = json.loads(shown(["sub/report.py", "x"], folder, mypt=False))
    assert (ours["path"], ours["argv"]) == (plain["path"], plain["argv"])


def test_core_is_this_engine_and_there_is_one_of_each_module(project):
    folder = project({
        "core/__init__.py": "raise SystemExit('the user engine ran')",
        "core/banner.py": "raise SystemExit('the user banner ran')",
        "s.py": """\
            import sys
            import core, core.banner
            import mypt_fast.core, mypt_fast.core.banner as direct
            from core import print_banner, special_tokens
            from core.special_tokens import BASE_VOCAB_SIZE
            import importlib
            assert core is mypt_fast.core
            assert core.banner is direct is sys.modules["core.banner"]
            assert direct.__name__ == direct.__spec__.name == "mypt_fast.core.banner"
            assert core.__spec__.name == "mypt_fast.core"
            assert print_banner is direct.print_banner
            assert special_tokens is sys.modules["mypt_fast.core.special_tokens"]
            assert importlib.import_module("core.training_utils") is core.training_utils
            del sys.modules["core"]
            import core as again
            assert again is core
            assert "torch" not in sys.modules
            print(BASE_VOCAB_SIZE, core.__version__)
        """,
    })  # fmt: skip
    assert shown(["s.py"], folder) == "50257 0.2.0\n"


@pytest.mark.parametrize("script", ["s.py", "scripts/s.py", "scripts/deep/s.py"])
@pytest.mark.parametrize("from_elsewhere", [False, True])
def test_what_we_do_not_have_comes_from_the_users_folder(project, script, from_elsewhere):
    folder = project({
        "core/__init__.py": "raise SystemExit('the user engine ran')",
        "core/rag/__init__.py": "from .index import Index\nfrom ..banner import print_banner\n",
        "core/rag/index.py": "from core import get_banner_string\nfrom core.agent import NAME\n"
                             "class Index: pass\n",
        "core/agent.py": "from .banner import ROBOT_HEAD\nfrom . import rag\nNAME = 'agent'\n",
        "elsewhere/x": "",
        script: """\
            import sys
            sys.path.insert(0, "/no/such/folder")     # the wrong entry of scripts in sub-folders
            from core import rag, agent
            import core.rag.index
            import mypt_fast.core.rag.index, mypt_fast.core.agent
            from core.rag import Index, print_banner
            assert rag.__name__ == "core.rag" and Index is core.rag.index.Index
            assert core.agent is agent is mypt_fast.core.agent
            assert mypt_fast.core.rag is rag
            assert sys.modules["mypt_fast.core.rag.index"] is core.rag.index
            assert print_banner is core.banner.print_banner
            print("ok")
        """,
    })  # fmt: skip
    cwd = folder / "elsewhere" if from_elsewhere else folder
    word = str(folder / script) if from_elsewhere else script
    assert shown([word], cwd) == "ok\n"


def test_the_users_core_is_found_in_cwd_on_pythonpath_and_where_the_script_points(project):
    folder = project({
        "lib/core/extra.py": "VALUE = 7", "work/x": "",
        "alone/s.py": "from core import extra\nprint(extra.VALUE)",
        "alone/t.py": """\
            import sys
            sys.path.append(sys.argv[1])
            from core.extra import VALUE
            print(VALUE)
        """,
    })  # fmt: skip
    script, lib = str(folder / "alone/s.py"), str(folder / "lib")
    assert shown([script], folder / "lib") == "7\n"
    path = os.pathsep.join((str(ROOT), lib))
    assert shown([script], folder / "work", env={"PYTHONPATH": path}) == "7\n"
    assert shown([str(folder / "alone/t.py"), lib], folder / "work") == "7\n"
    failed = start([script], folder / "work")
    assert failed.returncode == 1
    assert "core has no 'extra'" in failed.stderr


def test_a_folder_that_anybody_may_write_to_gives_no_modules(project):
    folder = project({"open/core/extra.py": "VALUE = 7", "open/mine/s.py": "import core.extra"})
    (folder / "open").chmod(0o777)
    assert "No module named 'core.extra'" in start([str(folder / "open/mine/s.py")], "/").stderr
    (folder / "open").chmod(0o755)
    assert shown([str(folder / "open/mine/s.py")], "/") == ""


@pytest.mark.parametrize("marker", ["core", "configs", "checkpoints", "pyproject.toml"])
def test_the_projects_root_is_on_the_path_of_a_script_two_folders_down(project, marker):
    folder = project({
        "helpers/__init__.py": "WORD = 'found'", "away/x": "",
        "scripts/model/s.py": """\
            import sys
            print(sys.path[1])
            from helpers import WORD
        """,
        marker if "." in marker else f"{marker}/x": "",
    })  # fmt: skip
    assert shown([str(folder / "scripts/model/s.py")], folder / "away") == f"{folder}\n"
    # a script outside of any project works in that of the working directory
    (folder / "loose").mkdir()
    assert shown(["scripts/model/s.py"], folder) == f"{folder}\n"


@pytest.mark.parametrize(
    ("body", "code", "said"),
    [
        ("pass", 0, ""),
        ("import sys; sys.exit()", 0, ""),
        ("import sys; sys.exit(3)", 3, ""),
        ("raise SystemExit(True)", 1, ""),
        ("import sys; sys.exit('no luck')", 1, "no luck\n"),
        ("import os; os._exit(9)", 9, ""),
        ("import atexit; atexit.register(lambda: print('bye')); raise SystemExit(4)", 4, ""),
    ],
)
def test_the_exit_code_is_the_scripts(project, body, code, said):
    folder = project({"s.py": body})
    ours, plain = (start(["s.py"], folder, mypt=mypt) for mypt in (True, False))
    assert (ours.returncode, ours.stderr) == (code, said)
    assert (ours.returncode, ours.stdout, ours.stderr) == (
        plain.returncode, plain.stdout, plain.stderr,
    )  # fmt: skip


@pytest.mark.parametrize(
    "body",
    [
        "def f():\n    return 1 / 0\n\nf()",
        "import helper\n",
        "import json\njson.loads('{')",
        "def f(:\n",
        "try:\n    1 / 0\nexcept ZeroDivisionError as e:\n    raise ValueError('x') from e",
        "import no_such_module",
        "import sys\nsys.excepthook = lambda *a: print('hooked', a[0].__name__)\n1 / 0",
        "raise OSError(28, 'No space left on device', 'x')",
    ],
)
def test_an_uncaught_exception_looks_as_it_does_under_python(project, body):
    folder = project({"s.py": body, "helper.py": "raise KeyError('deep')"})
    ours, plain = (start(["s.py"], folder, mypt=mypt) for mypt in (True, False))
    assert ours.returncode == plain.returncode == 1
    assert (ours.stdout, ours.stderr) == (plain.stdout, plain.stderr)
    assert "mypt_fast" not in ours.stderr


def test_threads_and_exit_handlers_still_have_core(project):
    folder = project({"s.py": """\
        import atexit, threading
        started = threading.Event()
        def later():
            threading.main_thread().join()
            from core.banner import get_banner_string
            import __main__
            print(__main__.WORD)
        WORD = "late"
        threading.Thread(target=later).start()
        atexit.register(lambda: print(__import__("core.special_tokens").__name__, WORD))
    """})  # fmt: skip
    assert shown(["s.py"], folder) == "late\nmypt_fast.core late\n"


def test_a_module_runs_as_with_python_dash_m(project):
    folder = project({
        "tool.py": REPORT, "pack/__init__.py": "", "pack/__main__.py": REPORT, "core/rag.py": "",
    })  # fmt: skip
    for words in (["-m", "tool", "--x-y", "-m"], ["-m", "pack", "a"]):
        ours, plain = (json.loads(shown(words, folder, mypt=mypt)) for mypt in (True, False))
        for key in ("argv", "name", "file", "path0"):
            assert ours[key] == plain[key], key
    failed = start(["-m", "no_such"], folder)
    assert failed.returncode == 2
    assert (
        failed.stderr
        == "error: module no_such; no module of that name; install it, or check the name\n"
    )
    broken = start(["-m", "broken"], project({"broken.py": "import also_missing"}))
    assert broken.returncode == 1
    assert "No module named 'also_missing'" in broken.stderr


def test_pytest_runs_the_users_tests_on_this_engine(project):
    folder = project({
        "core/__init__.py": "raise RuntimeError('the user engine ran')",
        "core/rag.py": "WORD = 'theirs'",
        "tests/conftest.py": "import core.banner",
        "tests/test_x.py": """\
            import pytest
            from core import get_banner_string, rag
            import mypt_fast.core

            def test_engine():
                import core
                assert core is mypt_fast.core
                assert "MyPT" in get_banner_string()
                assert rag.WORD == "theirs"
                with pytest.raises(ImportError, match="Tokenizer"):
                    from core import Tokeniser

            def test_fails():
                assert False
        """,
    })  # fmt: skip
    done = start(["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/"], folder)
    assert done.returncode == 1
    assert "1 failed, 1 passed" in done.stdout


def test_an_unknown_name_says_what_there_is_and_a_probe_does_not(project):
    folder = project({"s.py": """\
        import importlib.util
        import core
        assert not hasattr(core, "GTP") and not hasattr(core, "compliance")
        assert importlib.util.find_spec("core.compliance") is None
        assert importlib.util.find_spec("core.banner") is not None
        for text in ("from core import GTP", "from core import prnt_banner",
                     "import core.compliance", "from core.compliance import audit",
                     "core.GTP", "from core import zzzzzz"):
            try:
                exec(text)
            except (ImportError, AttributeError) as e:
                print(type(e).__name__, "|", e)
    """})  # fmt: skip
    lines = shown(["s.py"], folder).splitlines()
    assert lines[0].startswith("ImportError | core has no 'GTP'; did you mean GPT?; core has GPT, ")
    assert "did you mean print_banner?" in lines[1]
    assert lines[2:4] == ["ModuleNotFoundError | No module named 'core.compliance'"] * 2
    assert lines[4].startswith("AttributeError | core has no 'GTP'; did you mean GPT?")
    assert lines[5].startswith("ImportError | core has no 'zzzzzz'; it has GPT, GPTConfig, ")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "nothing to run"),
        (["--verbose", "s.py"], "unknown argument --verbose"),
        (["missing.py"], "script missing.py; no such file; "),
        (["trian.py"], "the nearest names: train.py"),
        (["experimnt.py"], "the nearest names: scripts/eval/experiment.py"),
        (["scripts"], "it is a folder"),
        (["other/train.py"], "no such file; the nearest names: train.py"),
        (["-m"], "-m: expected one argument"),
    ],
)
def test_what_cannot_run_is_told_in_one_line(words, said, project, capsys, monkeypatch):
    monkeypatch.chdir(project({"scripts/eval/experiment.py": "raise SystemExit(5)"}))
    assert main(["run", *words]) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ")
    assert said in line
    assert line.count("\n") == 1


def test_a_script_that_cannot_be_read_is_no_failure_of_the_script(project, capsys, monkeypatch):
    def refuse(loader, path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.chdir(project({"s.py": ""}))
    monkeypatch.setattr("importlib.machinery.SourceFileLoader.get_data", refuse)
    before = list(sys.path), list(sys.meta_path), list(sys.argv)
    assert main(["run", "s.py"]) == 2
    assert capsys.readouterr().err == f"error: {Path('s.py').absolute()}: Permission denied\n"
    assert (sys.path, sys.meta_path, sys.argv) == before


@pytest.mark.parametrize("folder", ["", "./", "scripts/", "scripts/model/", "scripts\\utils\\"])
def test_a_script_of_mypts_that_is_not_there_is_our_command(folder, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["run", folder + "calculate_params.py", "--show-formula"]) == 0
    assert capsys.readouterr().out.startswith("Total = token embeddings")
    assert main(["run", folder + "show_configs.py", "--config-file", "tiny"]) == 0
    assert "Layers      : 4" in capsys.readouterr().out


def test_a_script_that_is_there_wins_over_our_command(project):
    folder = project({"train.py": "import sys, core; print('mine', sys.argv[1:])"})
    assert shown(["train.py", "--max-iters", "3"], folder) == "mine ['--max-iters', '3']\n"


@pytest.mark.parametrize("script", cmd_run.STAND_INS)
def test_every_stand_in_answers_with_the_help_of_its_command(script, capsys, tmp_path, monkeypatch):
    command = cmd_run.STAND_INS[script][0]
    monkeypatch.chdir(tmp_path)
    assert main(["run", f"scripts/{script}", "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"usage: mypt-fast {command}")


@pytest.mark.slow
def test_two_processes_of_torchrun_run_the_script(project):
    folder = project({"s.py": """\
        import os, sys
        import core
        assert core.__name__ == "mypt_fast.core"
        print("rank", os.environ["RANK"], sys.argv[1:], flush=True)
    """})  # fmt: skip
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2",
            "--master_port", "0", "-m", "mypt_fast", "run", "s.py", "--x",
        ],
        capture_output=True, text=True, cwd=folder, check=False, timeout=100,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["rank 0 ['--x']", "rank 1 ['--x']"]


def test_a_second_script_in_one_process_sees_nothing_of_the_firsts_folder(project):
    """As a test of the user's does that calls main() twice."""
    driver = """\
        from mypt_fast.cli import main

        main(["run", "a/s.py"])
        main(["run", "b/s.py"])
        main(["run", "c/s.py"])
        """
    use = "import core.rag\nprint(core.rag.X)\n"
    folder = project({
        "driver.py": driver, "a/s.py": use, "a/core/rag.py": "X = 'a'", "b/s.py": use,
        "b/core/rag.py": "X = 'b'", "c/s.py": "try:\n    import core.rag\nexcept ImportError as e:"
        "\n    print(e.name)\n",
    })  # fmt: skip
    assert shown(["driver.py"], folder, mypt=False).split() == ["a", "b", "core.rag"]
