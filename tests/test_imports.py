"""The import table of the design: which room may import which, and that importing a module does nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = (
    "mxnet_reader",
    "config",
    "backbones",
    "losses",
    "partial_fc",
    "dataset",
    "eval",
    "utils",
    "train",
    "tools",
    "benchmarks",
)
EVERYTHING = set(ROOMS)
ALLOWED = {
    "mxnet_reader": set(),
    "config": set(),
    "backbones": set(),
    "losses": set(),
    "partial_fc": {"utils"},
    "dataset": {"mxnet_reader", "utils"},
    "eval": {"backbones", "mxnet_reader", "utils"},
    "utils": set(),
    "train": EVERYTHING,
    "tools": EVERYTHING - {"train"},
    "benchmarks": EVERYTHING,
}
FOLDERS = {"mxnet_reader", "backbones", "eval", "utils", "tools", "configs", "benchmarks", "docs", "tests"}
MAX_LINES = {"train.py": 250}


def source_files(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py")) if (ROOT / room).is_dir() else [ROOT / f"{room}.py"]


def imported_rooms(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names & EVERYTHING


@pytest.mark.parametrize("room", ROOMS)
def test_import_table(room):
    files = source_files(room)
    assert files and all(path.exists() for path in files), f"{room} is missing"
    for path in files:
        forbidden = imported_rooms(ast.parse(path.read_text())) - ALLOWED[room] - {room}
        assert not forbidden, (
            f"{path.relative_to(ROOT)} imports {sorted(forbidden)}; the table allows {sorted(ALLOWED[room])}"
        )


def test_the_walk_sees_an_import_inside_a_function():
    tree = ast.parse("def f():\n    from train import main\n    import eval.metrics as m\n")
    assert imported_rooms(tree) == {"train", "eval"}


RECOMPUTE = "paddle.distributed.fleet.utils"  # where Paddle keeps gradient recompute: no collective


def test_only_utils_distributed_calls_collectives():
    for path in (path for room in ROOMS if room != "benchmarks" for path in source_files(room)):
        if path == ROOT / "utils" / "distributed.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            if module == RECOMPUTE and [alias.name for alias in node.names] == ["recompute"]:
                continue
            uses = any(name.startswith("paddle.distributed") for name in [*names, module])
            assert not uses, f"{path.relative_to(ROOT)} imports paddle.distributed; only utils/distributed.py may"


def test_house_has_no_further_folders():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    folders = {name.split("/")[0] for name in listed if "/" in name} - {".ci", ".github"}
    assert folders <= FOLDERS, f"not in the design: {sorted(folders - FOLDERS)}"


def test_files_stay_readable():
    for path in (path for room in ROOMS for path in source_files(room)):
        most = MAX_LINES.get(path.name if path.parent == ROOT else "", 400)
        num_lines = len(path.read_text().splitlines())
        assert num_lines <= most, f"{path.relative_to(ROOT)} has {num_lines} lines, more than {most}"


def test_importing_does_nothing(tmp_path):
    """Every module imports silently, from another folder, and leaves no file behind."""
    modules = []
    for path in (path for room in ROOMS if room != "benchmarks" for path in source_files(room)):
        parts = path.relative_to(ROOT).with_suffix("").parts
        modules.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    code = f"import importlib, sys\nsys.path.insert(0, {str(ROOT)!r})\n"
    code += f"for name in {modules!r}: importlib.import_module(name)\n"
    command = [sys.executable, "-B", "-W", "ignore", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == "", f"importing printed {done.stdout[:300]!r}"
    assert list(tmp_path.iterdir()) == []


def test_mxnet_reader_needs_numpy_only(tmp_path):
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import mxnet_reader.recordio\n"
        "print([m for m in ('paddle', 'mxnet', 'cv2', 'simplejpeg') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
