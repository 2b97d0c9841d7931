"""Every script's command line: what argparse refuses is one line on stderr and exit status 1, as for any bad input."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [ROOT / "train.py", *(ROOT / "tools").rglob("*.py"), *(ROOT / "eval").glob("*.py")]
    if 'if __name__ == "__main__"' in path.read_text(encoding="utf-8")
)


def test_scripts_are_found():
    assert {"train.py", "tools/rec.py", "tools/clean.py", "eval/ijb.py", "eval/verification.py"} <= set(SCRIPTS)


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
