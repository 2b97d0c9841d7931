"""Builds the test device's plug-in with g++ and loads it into Paddle: a few seconds, once for each state of its source.

    python tests/device/build.py      # prints the folder to give as CUSTOM_DEVICE_ROOT

The folder lies in the user's cache (``$XDG_CACHE_HOME``, else ``~/.cache``) and is named by a digest of the source and
of Paddle's version, so that a change builds anew and processes beside each other share one build.
"""

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCE = Path(__file__).resolve().parent / "plugin"
DEVICE = "sandbox"
FLAGS = ("-O1", "-std=c++17", "-fPIC", "-Wall", "-Wno-unknown-pragmas", "-DPADDLE_WITH_CUSTOM_DEVICE")


def why_not() -> str | None:
    """What keeps this machine from building it, None if nothing does."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return f"the test device is for x86-64 Linux, this is {platform.system()} on {platform.machine()}"
    if shutil.which("g++") is None:
        return "no g++ on this machine (apt-get install g++)"
    version = importlib.metadata.version("paddlepaddle")
    if not version.startswith("3.3."):
        return f"the test device is written for Paddle 3.3, this is {version}"
    return None


def build() -> Path:
    """The folder with the plug-in, built if it is not there yet.

    Raises:
        RuntimeError: ``why_not`` has a reason, or g++ fails (its messages are in the error).
    """
    if (reason := why_not()) is not None:
        raise RuntimeError(reason)
    paddle = Path(importlib.util.find_spec("paddle").origin).parent  # not imported: that would load devices already
    sources = sorted(SOURCE.glob("*.cc"))
    state = hashlib.blake2b(digest_size=10)
    for path in (*sources, *sorted(SOURCE.glob("*.h"))):
        state.update(path.read_bytes())
    state.update(repr((FLAGS, importlib.metadata.version("paddlepaddle"))).encode())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "arcface-paddle-test-device"
    folder = cache / state.hexdigest()
    if (folder / f"lib{DEVICE}.so").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    include = paddle / "include"
    with tempfile.TemporaryDirectory(dir=cache) as name:
        work = Path(name)

        def compile_one(path: Path) -> Path:
            out = work / f"{path.stem}.o"
            _run(["g++", *FLAGS, f"-I{include}", f"-I{include / 'third_party'}", "-c", str(path), "-o", str(out)])
            return out

        with ThreadPoolExecutor(len(sources)) as pool:
            objects = list(pool.map(compile_one, sources))
        library = work / "lib.so"
        linked = [f"-L{paddle / 'libs'}", "-lphi_core", "-lcommon"]
        _run(["g++", "-shared", "-o", str(library), *map(str, objects), *linked])
        library.replace(folder / f"lib{DEVICE}.so")  # whole or not at all, whoever else builds
    return folder


def environment() -> dict[str, str]:
    """This process's environment with the device in it, for children that run on it."""
    # A tensor's memory is given back when it dies and is NaN again for the next one: nothing recycled is read unseen.
    told = {"CUSTOM_DEVICE_ROOT": str(build()), "FLAGS_free_idle_chunk": "1", "GLOG_minloglevel": "2"}
    return os.environ | told


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


if __name__ == "__main__":
    print(build())
