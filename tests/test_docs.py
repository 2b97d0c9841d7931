"""The documents say what is true: commands exist, settings are known, code runs, links lead somewhere.

A block after ``<!-- run -->`` is executed as it stands (bash in a sandbox of its document, python in one process);
``<!-- run slow -->`` by ``make test-slow``. All others are checked: scripts, flags, configuration files, settings.
"""

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import yaml

from config import ConfigError, load_config, setting_names

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
SCRIPT = re.compile(r"^(?:[\w/]+/)*\w+\.py$")
SETTING = re.compile(r"^([a-z_]+(?:\.[a-z_0-9]+)+)=(.*)$")
LAUNCHER_FLAGS = {"--master", "--nnodes", "--nproc_per_node", "--log_dir", "--rank", "--gpus", "--devices", "--ips"}
# Commands of other systems, quoted in the left column of coming_from.md, are not ours to check.
FOREIGN = ("docs/coming_from.md",)


@dataclass(frozen=True)
class Block:
    """A fenced block: its document, first line, language, text, and the mark above it."""

    document: Path
    line: int
    language: str
    text: str
    mark: str  # "", "run" or "run slow"

    @property
    def name(self) -> str:
        return f"{self.document.relative_to(ROOT)}:{self.line}"


def blocks_of(document: Path) -> list[Block]:
    blocks, language, start, body, mark, last_text = [], None, 0, [], "", ""
    for number, line in enumerate(document.read_text(encoding="utf-8").splitlines(), 1):
        fence = re.match(r"^\s*```(\w*)\s*$", line)
        if fence and language is None:
            language, start, body = fence.group(1), number, []
            found = re.fullmatch(r"<!-- (run|run slow) -->", last_text)
            mark = found.group(1) if found else ""
        elif fence:
            blocks.append(Block(document, start, language, "\n".join(body) + "\n", mark))
            language, last_text = None, ""
        elif language is not None:
            body.append(line)
        elif line.strip():
            last_text = line.strip()
    assert language is None, f"{document}: the block from line {start} on is not closed"
    return blocks


BLOCKS = [block for document in DOCUMENTS for block in blocks_of(document)]


def commands_of(text: str) -> list[list[str]]:
    """Words of each command line: continuation lines joined, comments dropped, split at pipes and && and ;."""
    commands = []
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>()")
        lexer.whitespace_split, lexer.commenters = True, "#"
        words = []
        for word in [*lexer, ";"]:
            if set(word) <= set("|&;<>()"):
                commands.append(words)
                words = []
            else:
                words.append(word)
    return [words for words in commands if words]


def quoted_commands(document: Path) -> list[list[str]]:
    """Commands in `code spans` of prose and tables, the foreign column of coming_from.md left out."""
    found, inside = [], False
    for line in document.read_text(encoding="utf-8").splitlines():
        if line.lstrip().startswith("```"):
            inside = not inside
        if inside or line.lstrip().startswith("```"):
            continue
        cells = re.split(r"(?<!\\)\|", line)
        if line.startswith("|") and str(document.relative_to(ROOT)) in FOREIGN:
            line = "|".join(cells[2:])
        for span in re.findall(r"`([^`]+)`", line):
            if re.match(r"^(\w+=\S+ )*(\.venv/bin/)?python |^make ", span):
                found += commands_of(span)
            elif all(SETTING.match(word) for word in span.split()) and span.split():
                found.append(["settings", *span.split()])
    return found


@cache
def help_of(script: str) -> str:
    done = subprocess.run(
        [sys.executable, str(ROOT / script), "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, f"{script} --help: {done.stderr[-500:]}"
    return done.stdout


@cache
def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def problems(words: list[str], where: str) -> list[str]:
    """What is wrong with one command of ours."""
    while words and re.match(r"^[A-Z_]+=", words[0]):
        words = words[1:]
    if not words:
        return []
    if words[0] == "make":
        return [f"{where}: no make target {w!r}" for w in words[1:] if "=" not in w and w not in make_targets()]
    if words[0] == "settings":
        return setting_problems(words[1:], None, where)
    if Path(words[0]).name not in ("python", "python3"):
        return []
    found, rest = [], words[1:]
    if rest[:1] == ["-m"] and rest[1:2] == ["paddle.distributed.launch"]:
        rest = rest[2:]
        while rest and rest[0].startswith("--"):
            flag = rest[0].split("=")[0]
            if flag not in LAUNCHER_FLAGS:
                found.append(f"{where}: {flag} is no flag of the launcher")
            rest = rest[1:] if "=" in rest[0] else rest[2:]
    if not rest or not SCRIPT.match(rest[0]):
        return found
    script, arguments = rest[0], rest[1:]
    if not (ROOT / script).is_file():
        return [*found, f"{where}: no script {script}"]
    known = set(re.findall(r"(?<![\w-])--?[a-zA-Z][\w-]*", help_for(script, arguments)))
    found += [
        f"{where}: {script} has no flag {word.split('=')[0]}"
        for word in arguments
        if re.match(r"^--?[a-zA-Z]", word) and word.split("=")[0] not in known
    ]
    if script == "train.py":
        files = [word for word in arguments if word.endswith(".yaml") and not SETTING.match(word)]
        for name in files:
            if name.startswith("configs/") and not (ROOT / name).is_file():
                found.append(f"{where}: no configuration {name}")
        settings = [word for word in arguments if SETTING.match(word)]
        usable = [name for name in files if (ROOT / name).is_file()]
        found += setting_problems(settings, ROOT / usable[0] if usable else None, where)
    return found


def help_for(script: str, arguments: list[str]) -> str:
    """``--help`` of the script and, where it has commands (rec.py pack), of the one that is used."""
    text = help_of(script)
    subcommands = re.search(r"\{([\w,-]+)\}", text)
    if subcommands and arguments and arguments[0] in subcommands.group(1).split(","):
        done = subprocess.run(
            [sys.executable, str(ROOT / script), arguments[0], "--help"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        text += done.stdout
    return text


def setting_problems(settings: list[str], base: Path | None, where: str) -> list[str]:
    found = []
    for setting in settings:
        name, value = SETTING.match(setting).groups()
        if name.split(".")[0] not in setting_names():
            continue  # not ours: some.module=...
        if name not in setting_names() and not name.startswith("data.augment."):
            found.append(f"{where}: no setting {name}")
        elif re.search(r"\b(PATH|FOLDER|FILE)\b|\.\.\.|\|", value) or value == "":
            continue
    concrete = [s for s in settings if not re.search(r"=$|PATH|FOLDER|\.\.\.|\|", s)]
    if not found and concrete and base is not None:
        try:
            load_config(base, concrete)
        except ConfigError as error:
            found.append(f"{where}: {error}")
    return found


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_in_documents_exist(document):
    found = []
    for block in blocks_of(document):
        if block.language in ("bash", "sh", "shell"):
            for words in commands_of(block.text):
                found += problems(words, block.name)
    for words in quoted_commands(document):
        found += problems(words, str(document.relative_to(ROOT)))
    assert not found, "\n".join(found)


def test_the_check_itself_sees_mistakes():
    """A wrong script, flag, file, setting, value or target is found."""
    for text, expected in {
        "python eval/nothing.py": "no script",
        "python train.py configs/none.yaml": "no configuration",
        "python train.py configs/mnist_softmax.yaml optim.learning=1": "no setting",
        "python train.py configs/mnist_softmax.yaml optim.lr=fast": "optim.lr",
        "python tools/doctor.py --nonsense 3": "no flag --nonsense",
        "python -m paddle.distributed.launch --processes 2 train.py": "launcher",
        "make nonsense": "no make target",
    }.items():
        (words,) = commands_of(text)
        found = problems(words, "here")
        assert found and expected in found[0], (text, found)


def test_settings_in_yaml_blocks_are_known(tmp_path):
    for block in (block for block in BLOCKS if block.language == "yaml"):
        try:
            tree = yaml.safe_load(block.text)
            if isinstance(tree, dict) and set(tree) <= set(setting_names()):
                path = tmp_path / "block.yaml"
                path.write_text(block.text)
                load_config(path)
        except (ConfigError, yaml.YAMLError) as error:
            raise AssertionError(f"{block.name}: {error}") from None


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document):
    for label, target in re.findall(r"\[([^\]]*)\]\(([^)\s]+)\)", document.read_text(encoding="utf-8")):
        if re.match(r"^[a-z]+:", target) or target.startswith("#"):
            continue
        path = (document.parent / target.split("#")[0]).resolve()
        assert path.exists(), f"{document.relative_to(ROOT)}: [{label}]({target}) leads nowhere"


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "python"], ids=lambda block: block.name)
def test_python_blocks_compile(block):
    compile(block.text, block.name, "exec")


def test_no_document_quotes_what_git_would_not_have():
    """Placeholders of the writing are gone."""
    for document in DOCUMENTS:
        assert not re.search(r"@[A-Z]{4,}@|TODO|FIXME|XXX", document.read_text(encoding="utf-8")), document


def documents_marked(mark: str) -> list[Path]:
    return [document for document in DOCUMENTS if any(block.mark == mark for block in blocks_of(document))]


def run_document(document: Path, marks: tuple[str, ...], folder: Path, timeout: float) -> None:
    """Run the marked blocks of a document, in order, in a folder that looks like a checkout without data or runs."""
    for entry in ROOT.iterdir():
        if entry.name not in ("work_dirs", "log", "data") and not entry.name.startswith("."):
            (folder / entry.name).symlink_to(entry)
    binaries = folder / ".bin"
    binaries.mkdir()
    for name in ("python", "python3"):
        (binaries / name).write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
        (binaries / name).chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PADDLE_")}
    environment |= {
        "PATH": f"{binaries}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "PYTHONWARNINGS": "ignore",
    }
    for block in (block for block in blocks_of(document) if block.mark in marks):
        command = ["bash", "-euo", "pipefail", "-c", block.text]
        if block.language == "python":
            command = [sys.executable, "-c", block.text]
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=timeout
        )
        output = (done.stdout + done.stderr)[-3000:]
        assert done.returncode == 0, f"{block.name} ended with {done.returncode}:\n{block.text}\n{output}"


@pytest.mark.parametrize("document", documents_marked("run"), ids=lambda path: str(path.relative_to(ROOT)))
def test_marked_blocks_run(document, tmp_path):
    run_document(document, ("run",), tmp_path, timeout=240)


@pytest.mark.slow
@pytest.mark.parametrize("document", documents_marked("run slow"), ids=lambda path: str(path.relative_to(ROOT)))
def test_slow_blocks_run(document, tmp_path):
    run_document(document, ("run", "run slow"), tmp_path, timeout=1800)
