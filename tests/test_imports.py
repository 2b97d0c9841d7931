"""The import table: which room may import which, and that importing a module does nothing."""

import ast
import importlib.util
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
UTILS = tuple(f"utils.{room}" for room in ("head", "data", "model", "photos", "weights", "run"))
ROOMS += UTILS
EVERYTHING = set(ROOMS)
ALLOWED = {
    "mxnet_reader": set(),
    "config": set(),
    "backbones": set(),
    "losses": set(),
    "partial_fc": {"utils", "utils.head"},
    "dataset": {"mxnet_reader", "utils", "utils.data"},
    "eval": {"backbones", "mxnet_reader", "utils", *UTILS},
    "utils": set(),
    "utils.head": {"utils"},
    "utils.data": {"utils"},
    "utils.model": {"utils"},
    "utils.photos": {"utils"},
    "utils.weights": {"utils"},
    "utils.run": {"utils", *UTILS},
    "train": EVERYTHING,
    "tools": EVERYTHING - {"train"},
    "benchmarks": EVERYTHING,
}
FROM_EVERYWHERE = "utils.errors"  # the standard library alone
FOLDERS = {"mxnet_reader", "backbones", "eval", "utils", "tools", "configs", "benchmarks", "docs", "tests"}


def source_files(room: str) -> list[Path]:
    """Files of a room, those of its sub-rooms left out where these are rooms of the table."""
    folder = ROOT / room.replace(".", "/")
    if not folder.is_dir():
        return [folder.with_suffix(".py")]
    return sorted(folder.glob("*.py") if room == "utils" else folder.rglob("*.py"))


def room_of(name: str) -> str | None:
    """The room that a dotted name belongs to, the innermost one; None for other people's packages."""
    first, _, rest = name.partition(".")
    inner = f"{first}.{rest.partition('.')[0]}"
    return (
        None
        if name.startswith(FROM_EVERYWHERE)
        else inner
        if inner in EVERYTHING
        else first
        if first in EVERYTHING
        else None
    )


def imported_rooms(tree: ast.AST) -> set[str]:
    """Rooms that are imported, inside functions too; not what stands under ``if TYPE_CHECKING``."""
    names, todo = [], [tree]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            todo += node.orelse
            continue
        todo += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return {room_of(name) for name in names} - {None}


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
    assert folders <= FOLDERS, f"not in the table: {sorted(folders - FOLDERS)}"


def test_the_walk_knows_sub_rooms_and_leaves_types_out():
    code = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from config import Config\n"
    tree = ast.parse(code + "from utils.head.rows import RowBank\nfrom utils import distributed, errors\n")
    assert imported_rooms(tree) == {"utils.head", "utils"}


def test_every_room_says_what_it_owns():
    for room in (room for room in ROOMS if (ROOT / room.replace(".", "/")).is_dir() and room not in ("benchmarks",)):
        assert ast.get_docstring(ast.parse((ROOT / room.replace(".", "/") / "__init__.py").read_text())), room


def test_the_training_script_is_one_page():
    num_lines = len((ROOT / "train.py").read_text().splitlines())
    assert num_lines < 250, f"train.py has {num_lines} lines"


def test_importing_does_nothing(tmp_path):
    """Every module imports silently, from another folder, and leaves no file behind."""
    modules = []
    for path in (path for room in ROOMS if room != "benchmarks" for path in source_files(room)):
        parts = path.relative_to(ROOT).with_suffix("").parts
        modules.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    if importlib.util.find_spec("numba") is None:
        modules.remove("utils.head.numba_kernel")  # compiles its functions with it
    code = f"import importlib, sys\nsys.path.insert(0, {str(ROOT)!r})\n"
    code += f"for name in {modules!r}: importlib.import_module(name)\n"
    command = [sys.executable, "-B", "-W", "ignore", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == "", f"importing printed {done.stdout[:300]!r}"
    assert list(tmp_path.iterdir()) == []


ZLIB_FIRST = """
import os, runpy, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "paddle":
            os._exit("zlib" not in sys.modules)
assert not {"paddle", "zlib"} & set(sys.modules)
sys.meta_path.insert(0, Finder())
for script in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        sys.path[0] = os.path.dirname(script)
        runpy.run_path(script, run_name="script")
        os._exit(0)  # it needs no paddle at its start
    if os.waitpid(child, 0)[1]:
        print(script)
"""


def test_scripts_load_zlib_before_paddle(tmp_path):
    """Paddle 2.6 exports a zlib of its own: Python's, loaded later, binds to it and crashes when it compresses."""
    rooms = [path for room in ("train", "eval", "tools") for path in source_files(room)]
    scripts = [str(path) for path in rooms if "\nif __name__ ==" in path.read_text()]
    late = tmp_path / "late.py"
    late.write_text("import paddle\nimport zlib\n")
    command = [sys.executable, "-B", "-c", ZLIB_FIRST, *scripts, str(late)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(scripts) > 10 and done.stdout.split() == [str(late)], done.stdout


def test_mxnet_reader_needs_numpy_only(tmp_path):
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import mxnet_reader.recordio\n"
        "print([m for m in ('paddle', 'mxnet', 'cv2', 'simplejpeg') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
