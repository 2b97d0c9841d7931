"""The Dockerfiles without an engine: read, their steps executed in a fresh folder with a fresh environment.

What a base image would bring is a Python of the same minor version; apt-get and useradd are not executed, and the
library that apt-get adds is checked against what the installed wheels really need.
"""

import fnmatch
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

tomllib = pytest.importorskip("tomllib", reason="tomllib came with Python 3.11, which the images have")
ROOT = Path(__file__).resolve().parent.parent
FILES = ("Dockerfile", "Dockerfile.gpu")
# Shared libraries of a slim Debian (libc6, libgcc-s1, libstdc++6, zlib1g are essential or required packages there).
SLIM = {
    "ld-linux-x86-64.so.2", "libc.so.6", "libdl.so.2", "libm.so.6", "libpthread.so.0", "librt.so.1", "libutil.so.1",
    "libgcc_s.so.1", "libstdc++.so.6", "libz.so.1",
}  # fmt: skip


@dataclass(frozen=True)
class Step:
    """One instruction with its continuation lines joined."""

    name: str
    text: str


def read_steps(name: str) -> list[Step]:
    lines = [line for line in (ROOT / name).read_text().splitlines() if line.strip() and not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ").splitlines()
    steps = [Step(*line.strip().split(None, 1)) for line in joined]
    known = {"FROM", "ARG", "ENV", "RUN", "COPY", "WORKDIR", "USER", "CMD"}
    assert {step.name for step in steps} <= known, {step.name for step in steps} - known
    return steps


def ignored(path: str) -> bool:
    """.dockerignore of this repository: plain names, ``*`` inside a name, a leading ``**/``."""
    parts = path.split("/")
    for pattern in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = pattern.strip()
        if not pattern or pattern.startswith("#"):
            continue
        if pattern.startswith("**/"):
            if any(fnmatch.fnmatch(part, pattern[3:]) for part in parts):
                return True
        elif fnmatch.fnmatch(parts[0], pattern):
            return True
    return False


def context() -> list[str]:
    """Files of the checkout that an engine would see: tracked or new, .dockerignore applied."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return [path for path in listed if not ignored(path) and (ROOT / path).is_file()]


def copy(words: list[str], folder: Path) -> None:
    *sources, target = words
    destination = folder / target
    for path in context():
        if "." in sources or path in sources:
            file = destination / path if target in (".", "./") else destination
            file.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / path, file)


@pytest.mark.parametrize("name", FILES)
def test_base_and_packages_are_pinned(name):
    steps = read_steps(name)
    bases = [step.text for step in steps if step.name == "FROM"]
    assert bases and all(re.fullmatch(r"python:3\.1[0-2]\.\d+-slim-\w+", base) for base in bases)
    text = (ROOT / name).read_text()
    assert "constraints.txt" in text and "PIP_NO_CACHE_DIR=1" in text
    assert [step.text for step in steps if step.name == "USER"] == ["arcface"], "it must not run as root"
    for step in steps:
        if step.name == "RUN" and "apt-get install" in step.text:
            assert "--no-install-recommends" in step.text and "rm -rf /var/lib/apt/lists" in step.text


def test_every_pinned_requirement_stands_in_constraints():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = {
        line.split("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    wanted = [
        *project["dependencies"],
        *(r for e in ("cpu", "demo", "export") for r in project["optional-dependencies"][e]),
    ]
    names = {re.match(r"[\w.-]+", requirement).group(0).lower().replace("_", "-") for requirement in wanted}
    assert names <= pins, f"not pinned: {sorted(names - pins)}"


def test_context_is_the_program_and_nothing_else():
    files = context()
    assert {"train.py", "config.py", "tools/doctor.py", "configs/ms1mv2_r50.yaml", "constraints.txt"} <= set(files)
    assert not [path for path in files if re.match(r"(\.git/|\.venv|data/|work_dirs/|tests/)", path)]
    size = sum((ROOT / path).stat().st_size for path in files)
    assert size < 20e6, f"{size / 1e6:.0f} MB would go into the image"


@pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump (binutils) is not installed")
def test_libgomp_is_the_only_library_that_is_missing():
    site = Path(subprocess.run([sys.executable, "-c", "import numpy; print(numpy.__path__[0])"],
                               capture_output=True, text=True, check=True).stdout.strip()).parent  # fmt: skip
    libraries = [path for pattern in ("paddle/**/*.so*", "cv2/*.so*", "opencv*/*.so*", "simplejpeg*/**/*.so*")
                 for path in site.glob(pattern) if path.is_file()]  # fmt: skip
    assert any("paddle" in str(path) for path in libraries)
    needed = set()
    for start in range(0, len(libraries), 50):
        done = subprocess.run(
            ["objdump", "-p", *map(str, libraries[start : start + 50])], capture_output=True, text=True, check=True
        )
        needed |= set(re.findall(r"NEEDED\s+(\S+)", done.stdout))
    bundled = {path.name for path in libraries}
    missing = {name for name in needed - bundled - SLIM if not re.search(r"-[0-9a-f]{8}\.", name)}
    assert missing <= {"libgomp.so.1"}, missing
    assert "libgomp1" in (ROOT / "Dockerfile").read_text()


def execute(name: str, folder: Path, python: Path, run) -> int:
    """Interpret a Dockerfile: ``/opt/arcface`` is ``folder``, ``python`` the base image's; RUN steps go to ``run``."""
    environment = {"PATH": f"{python.parent}{os.pathsep}/usr/bin{os.pathsep}/bin", "HOME": str(folder)}
    environment |= {
        key: value
        for key, value in os.environ.items()
        if key.startswith(("PIP_", "SSL_", "REQUESTS_")) or "proxy" in key.lower()
    }
    num_run = 0
    for step in read_steps(name):
        if step.name == "ENV":
            environment |= dict(pair.split("=", 1) for pair in shlex.split(step.text))
        elif step.name == "WORKDIR":
            assert step.text == "/opt/arcface"
        elif step.name == "COPY":
            copy(step.text.split(), folder)
        elif step.name == "RUN" and not re.search(r"apt-get|useradd", step.text):
            num_run += 1
            run(step.text, environment)
    return num_run


def test_steps_but_the_download(tmp_path):
    """Every step of the CPU image with pip replaced by a recorder: what would be installed, and the self-check runs."""
    binaries, folder = tmp_path / "bin", tmp_path / "image"
    binaries.mkdir()
    folder.mkdir()
    for name in ("python", "pip"):
        target = (
            f'exec {sys.executable} "$@"'
            if name == "python"
            else f'cp "$5" {tmp_path}/asked.txt; echo "$@" > {tmp_path}/pip.txt'
        )
        (binaries / name).write_text(f"#!/bin/sh\n{target}\n")
        (binaries / name).chmod(0o755)

    def run(text, environment):
        done = subprocess.run(
            ["sh", "-c", text], cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{text}\n{done.stdout}{done.stderr}"

    assert execute("Dockerfile", folder, binaries / "python", run) == 2
    asked = (tmp_path / "asked.txt").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(project["dependencies"]) <= set(asked.splitlines()) and "paddlepaddle==3.3.1" in asked
    assert (tmp_path / "pip.txt").read_text().split()[:3] == ["install", "-c", "constraints.txt"]
    assert not (folder / "tests").exists() and (folder / "train.py").is_file()


@pytest.mark.slow
def test_steps_in_a_fresh_environment(tmp_path):
    """The CPU image for real: fresh environment, pinned wheels from the index, self-check, a training step."""
    folder = tmp_path / "image"
    folder.mkdir()
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "base")], check=True)
    python = tmp_path / "base" / "bin" / "python"

    def run(text, environment):
        done = subprocess.run(
            ["sh", "-c", text], cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{text}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"

    execute("Dockerfile", folder, python, run)
    environment = {"PATH": f"{python.parent}:/usr/bin:/bin", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = (
        "python train.py configs/mnist_softmax.yaml run.max_steps=3 log.plane_every_steps=0 run.output=work_dirs/image "
        "&& test -f work_dirs/image/backbone.pdparams && python train.py --help"
    )
    run(command, environment)
