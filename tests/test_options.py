"""Options that commands share: whatever embeds a user's images takes the same ones and hands them on."""

import ast
import importlib
from pathlib import Path

import pytest

from eval.embed import ENGINES, PRECISIONS

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = {  # file that calls load_embedder -> the command lines that lead there
    "eval/verification.py": [["eval.verification"]],
    "eval/ijb.py": [["eval.ijb"]],
    "tools/embed.py": [["tools.embed"]],
    "tools/compare.py": [["tools.compare"]],
    "tools/model_test.py": [["tools.model_test"]],
    "tools/search.py": [["tools.search", "enrol"], ["tools.search", "find"]],
    "tools/clean/command.py": [["tools.clean.command"]],
}
OTHERS = {  # no user's choice: a library, the demo's own report, a fixed engine on a device
    "eval/embed.py",
    "eval/pairs.py",
    "tools/demo/stages.py",
    "tools/gpu_kernels.py",
    "tools/quantize.py",  # compares float32 with int8, both in OpenVINO
}


def calls_of_load_embedder() -> dict[str, list[ast.Call]]:
    found = {}
    for folder in ("eval", "tools"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            calls = [
                node
                for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
                if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "load_embedder"
            ]
            if calls:
                found[path.relative_to(ROOT).as_posix()] = calls
    return found


def test_every_command_that_embeds_is_listed_and_hands_its_options_on():
    found = calls_of_load_embedder()
    assert set(found) == set(COMMANDS) | OTHERS
    for path in COMMANDS:
        for call in found[path]:
            given = [ast.unparse(value) for value in call.args]
            assert "args.engine" in given, f"{path}:{call.lineno}"
            assert "precision" in {keyword.arg for keyword in call.keywords}, f"{path}:{call.lineno}"


@pytest.mark.parametrize("command", [line for lines in COMMANDS.values() for line in lines], ids="-".join)
def test_commands_that_embed_take_the_same_options(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as caught:
        importlib.import_module(command[0]).main([*command[1:], "--help"])
    assert caught.value.code == 0
    told = " ".join(capsys.readouterr().out.split())
    assert all(f" {option} " in told for option in ("--engine ENGINE", "--precision PRECISION", "--device DEVICE"))
    assert f"auto (the fastest that works here), {', '.join(ENGINES)}" in told
    assert f"one of {', '.join(PRECISIONS)}" in told
