"""Every script's command line: what argparse refuses is one line on stderr and exit status 1, as for any bad input."""

import argparse
import ast
import importlib.util
import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from utils.errors import COUNT, UserError, check_ranges, one_line_errors

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("tools", "eval", "benchmarks")
SCRIPTS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [ROOT / "train.py", *(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))]
    if 'if __name__ == "__main__"' in path.read_text(encoding="utf-8") and not path.name.startswith("peer_")
)


def test_scripts_are_found():
    assert {"train.py", "tools/rec.py", "tools/clean.py", "eval/ijb.py", "benchmarks/head.py"} <= set(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_wrong_options_are_one_line(script, capsys):
    spec = importlib.util.spec_from_file_location(f"script_{Path(script).stem}", ROOT / script)
    module = importlib.util.module_from_spec(spec)  # by its path: a folder beside it may have the same name
    spec.loader.exec_module(module)
    with pytest.raises(SystemExit) as end:
        module.main(["--no-such-option", "x"])
    assert end.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "-1", "1e400", "2"])
def test_numbers_out_of_range_are_refused(text):
    with pytest.raises(UserError, match=r"--min-score .*: must be from 0 to 1"):
        check_ranges(argparse.Namespace(min_score=float(text)), min_score=(0, 1))
    with pytest.raises(UserError, match=r"--rates .*: must be from 0 to 1"):
        check_ranges(argparse.Namespace(rates=[0.5, float(text)]), rates=(0, 1))
    check_ranges(argparse.Namespace(min_score=None), min_score=(0, 1), other=COUNT)


def numbers_of(tree: ast.Module) -> set[str]:
    """Options of ``add_argument`` that are numbers."""
    return {
        next((k.value.value for k in node.keywords if k.arg == "dest"), node.args[0].value.strip("-").replace("-", "_"))
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and getattr(node.func, "attr", None) == "add_argument"
        if any(k.arg == "type" and getattr(k.value, "id", None) in ("int", "float") for k in node.keywords)
    }


def checked_in(tree: ast.Module) -> set[str]:
    """Names with a range: of ``check_ranges`` or of a table, or compared."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "check_ranges":
            names |= {keyword.arg for keyword in node.keywords}
        elif isinstance(node, ast.Compare) or "RANGES" in map(ast.unparse, getattr(node, "targets", ())):
            parts = list(ast.walk(node))
            names |= {part.attr for part in parts if isinstance(part, ast.Attribute)}
            names |= {part.value for part in parts if isinstance(part, ast.Constant)}
    return names


def test_every_number_has_a_range():
    shared = {"benchmarks": checked_in(ast.parse((ROOT / "benchmarks" / "common.py").read_text(encoding="utf-8")))}
    for room in ROOMS:
        for path in (ROOT / room).rglob("*.py"):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            if path.name != "options.py":  # what is shared is checked by the commands: next test
                assert numbers_of(tree) <= checked_in(tree) | shared.get(room, set()), path


def test_shared_numbers_have_a_range_wherever_they_are_taken():
    for path, names in {
        "eval/verification.py": {"batch_size", "num_errors"},
        "eval/ijb.py": {"batch_size", "num_errors"},
    }.items():
        assert names <= checked_in(ast.parse((ROOT / path).read_text(encoding="utf-8"))), path


def test_long_messages_are_shortened(capsys):
    def fail():
        raise UserError(f"list.txt: line 1: {'a/' * 50_000}: no such file")

    with pytest.raises(SystemExit):
        one_line_errors(fail)()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: list.txt: line 1: a/") and line.endswith(": no such file") and len(line) < 2100


def test_names_that_the_terminal_cannot_show_are_shown_escaped(monkeypatch):
    terminal = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(terminal, encoding="utf-8", errors="strict"))
    one_line_errors(lambda: print("results in Jos\udce9", flush=True))()
    assert terminal.getvalue() == b"results in Jos\\udce9\n"


def test_memory_folders_and_interrupts_are_one_line(tmp_path, capsys):
    (tmp_path / "file").touch()
    for function, told in ((lambda: np.empty(2**58), "error: not enough memory: Unable to allocate"),
                           ((tmp_path / "file").mkdir, "a file is there where a folder is needed")):  # fmt: skip
        with pytest.raises(SystemExit):
            one_line_errors(function)()
        (line,) = capsys.readouterr().err.splitlines()
        assert told in line
    code = (
        "from utils.errors import one_line_errors\n@one_line_errors\ndef main():\n    raise KeyboardInterrupt\nmain()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stderr == "interrupted\n" and done.returncode != 0
