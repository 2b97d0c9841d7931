"""utils/files.py: whole files or none, stamps of many files, what a file really is."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from utils.errors import UserError
from utils.files import describe_bytes, file_stamps, write_array, write_csv, write_json, write_text, written_whole


def test_a_file_is_whole_or_absent(tmp_path):
    path = tmp_path / "a.b.npy"
    with pytest.raises(RuntimeError), written_whole(path) as aside:
        assert aside.parent == tmp_path and aside.suffix == ".npy"  # writers that choose by suffix, or add it
        aside.write_bytes(b"half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with written_whole(path) as first, written_whole(path) as second:
        assert first != second  # of one process number too: containers share it
        first.write_bytes(b"1")
        second.write_bytes(b"2")
    write_array(path, np.arange(3))
    assert np.load(path).tolist() == [0, 1, 2] and len(list(tmp_path.iterdir())) == 1


@pytest.mark.skipif(os.name == "nt", reason="no such devices there")
def test_what_must_not_be_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").touch()
    device, folder = "is a device or a pipe", "is a folder"
    for place, told in (("pipe", device), (".", folder), (tmp_path, folder), (Path("/dev/null"), device)):
        place = tmp_path / place
        with pytest.raises(UserError, match=f"^{place}: {told}"), written_whole(place):
            raise AssertionError("nothing may be written")
    with pytest.raises(UserError, match=r"/file/x: .*/file is a file, not a folder$"):
        write_text(tmp_path / "file" / "x", "y")
    with pytest.raises(FileNotFoundError, match=r"'.*/none/x'$"):
        write_csv(tmp_path / "none" / "x", [{"a": 1}])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "pipe"]


@pytest.mark.skipif(os.name == "nt", reason="no such limit there")
def test_a_full_disk_names_the_file(tmp_path):
    code = "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    code += "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)); from utils.files import write_text\n"
    code += "write_text(sys.argv[1], 'x' * 5000)"
    root = Path(__file__).resolve().parent.parent
    command = [sys.executable, "-c", code, str(tmp_path / "a.txt")]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.stderr.rstrip().endswith(f"File too large: '{tmp_path / 'a.txt'}'")
    assert not list(tmp_path.iterdir())


def test_json_and_csv(tmp_path):
    write_json(tmp_path / "a.json", {"x": [np.float64("nan"), -float("inf"), 1.5], "y": tmp_path})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": [None, None, 1.5], "y": str(tmp_path)}
    write_csv(tmp_path / "a.csv", [{"a": "x,y", "b": 1}])
    assert (tmp_path / "a.csv").read_bytes() == b'a,b\r\n"x,y",1\r\n'


def test_names_that_are_no_utf8_are_written(tmp_path):
    write_csv(tmp_path / "a.csv", [{"a": "Jos\udce9"}])
    write_text(tmp_path / "a.txt", "Jos\udce9")
    assert (tmp_path / "a.csv").read_text(encoding="utf-8").splitlines() == ["a", "Jos?"]
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "Jos?"


def test_stamps_of_files_in_several_folders(tmp_path):
    for name, content in (("a.jpg", b"1"), ("sub/b.jpg", b"22"), ("sub/other.jpg", b"333")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
        os.utime(tmp_path / name, ns=(0, len(content)))
    (tmp_path / "link.jpg").symlink_to(tmp_path / "nowhere")
    names = ["sub/b.jpg", "a.jpg", "none.jpg", "no/b.jpg", "link.jpg", "a.jpg"]
    assert file_stamps(tmp_path, names) == [(2, 2), (1, 1), None, None, None, (1, 1)]


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (b"", "an empty file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git-LFS pointer"),
        (b"\xef\xbb\xbf  <!DOCTYPE HTML>", "HTML page"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "a HEIC photo, whatever its name"),
        (b"\0\0\0\x20ftypavif\0\0\0\0", "an AVIF photo"),
        (b"II*\0\x08\0\0\0", "a TIFF picture"),
        (b"<?xml version='1.0'?><Error>", "XML page"),
        (b"\x1f\x8b\x08", "gzip"),
        (b"\x80\x02]q", "a pickle"),
        (bytes(512), "file of zeros"),
        (bytes(257).replace(b"\0", b"x") + b"ustar", "tar archive"),
        (b"hello world", "a text file that starts with 'hello world'"),
        (b"\xde\xad\xbe\xef", "it starts with deadbeef"),
    ],
)
def test_what_a_file_really_is(head, words):
    found = describe_bytes(head)
    assert words in found and "\n" not in found
