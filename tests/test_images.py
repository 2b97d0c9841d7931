"""Which files are images, in folders as people have them; text files as people's tools write them."""

import gzip
import os

import pytest

from utils.errors import UserError
from utils.images import find_image, find_image_files, is_image_name
from utils.text import read_text, read_text_lines


def touch(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def test_search_takes_images_at_any_depth_and_counts_the_rest(tmp_path):
    wanted = ["a.jpg", "a/0.JPG", "a/camera/x.jfif", "a.b/y.GIF", "b/z.tiff", "b/p.PGM"]
    junk = [".ipynb_checkpoints/0.jpg", "@eaDir/0.jpg", "__MACOSX/a/0.jpg", "a/._0.jpg", "b/.hidden/q.png", "Thumbs.db"]
    touch(tmp_path, *wanted, *junk, "a/notes.txt", "read.me", "a/jpg", "b/x.heic")
    found = find_image_files(tmp_path)
    assert found.names == sorted(wanted, key=lambda name: name.split("/"))
    assert [path.is_file() for path in found.paths()] == [True] * 6
    assert found.passed_over == {"hidden": (6, ".ipynb_checkpoints"), "files that are no images": (4, "a/jpg")}
    assert (
        found.summary() == f"{tmp_path}: passed over 6 hidden (.ipynb_checkpoints), 4 files that are no images (a/jpg)"
    )
    assert find_image_files(tmp_path / "b").names == ["p.PGM", "z.tiff"]


def test_search_follows_links_and_ends(tmp_path):
    touch(tmp_path, "elsewhere/anna/0.jpg", "root/bert/0.jpg", "root/bert/1.jpg")
    root = tmp_path / "root"
    (root / "anna").symlink_to(tmp_path / "elsewhere" / "anna", target_is_directory=True)
    (root / "anna_again").symlink_to(tmp_path / "elsewhere" / "anna", target_is_directory=True)
    (root / "bert" / "up").symlink_to(root, target_is_directory=True)
    (root / "gone.jpg").symlink_to(tmp_path / "nowhere")
    (root / "self.jpg").symlink_to(root / "self.jpg")
    (root / "one.jpg").symlink_to(tmp_path / "elsewhere" / "anna" / "0.jpg")
    found = find_image_files(root)
    assert found.names == ["anna/0.jpg", "anna_again/0.jpg", "bert/0.jpg", "bert/1.jpg", "one.jpg"]
    assert found.passed_over == {"links to a folder around them": (1, "bert/up"), "broken links": (2, "gone.jpg")}
    assert find_image_files(tmp_path / "root" / "bert" / "..").summary() is not None
    with pytest.raises(UserError, match="none: no such folder"):
        find_image_files(tmp_path / "none")


@pytest.mark.skipif(os.name == "nt", reason="no such files there")
def test_pipes_and_devices_are_no_images(tmp_path):
    touch(tmp_path, "a/0.jpg")
    os.mkfifo(tmp_path / "a/pipe.jpg")
    (tmp_path / "a/zero.png").symlink_to("/dev/zero")
    found = find_image_files(tmp_path)
    assert found.names == ["a/0.jpg"] and found.passed_over == {"pipes or devices": (2, "a/pipe.jpg")}


def test_a_clean_folder_has_nothing_to_say(tmp_path):
    touch(tmp_path, "a/0.jpg")
    assert find_image_files(tmp_path).summary() is None


def test_dots_in_names_are_no_suffixes(tmp_path):
    touch(tmp_path, "J.K._Row/J.K._Row_0001.jpg", "J.K._Row/J.K._Row_0002.PNG", "J.K._Row/J.K.jpg", "b/x.jpeg")
    folder = tmp_path / "J.K._Row"
    assert find_image(folder / "J.K._Row_0001") == folder / "J.K._Row_0001.jpg"
    assert find_image(folder / "J.K._Row_0002") == folder / "J.K._Row_0002.PNG"
    assert find_image(folder / "J.K._Row_0003") is None
    assert find_image(tmp_path / "b" / "x.jpeg") == tmp_path / "b" / "x.jpeg"
    assert is_image_name("a.b.JPEG") and not is_image_name("a.jpg.txt") and not is_image_name("jpg")


TEXT = "José/0.jpg\t0\n王小明/1.jpg\t1\n"


@pytest.mark.parametrize(
    ("encoding", "mark"),
    [("utf-8", b""), ("utf-8", b"\xef\xbb\xbf"), ("utf-16", b""), ("utf-16-be", b"\xfe\xff"), ("utf-16-le", b""),
     ("utf-16-be", b""), ("utf-32", b""), ("gb18030", b"")],
)  # fmt: skip
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_encodings(tmp_path, encoding, mark, end):
    path = tmp_path / "a.txt"
    path.write_bytes(mark + TEXT.replace("\n", end).encode(encoding))
    assert read_text(path) == TEXT
    assert read_text_lines(path) == TEXT.split("\n")[:2]


def test_gbk_without_its_newer_characters(tmp_path):
    (tmp_path / "a.txt").write_bytes("王小明/1.jpg 1\n".encode("gbk"))
    assert read_text_lines(tmp_path / "a.txt") == ["王小明/1.jpg 1"]
    (tmp_path / "a.txt").write_bytes(b"")
    assert read_text_lines(tmp_path / "a.txt") == []
    (tmp_path / "a.txt").write_bytes(b"a 1\n\n\nb 2")
    assert read_text_lines(tmp_path / "a.txt") == ["a 1", "", "", "b 2"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"a.jpg 0\nb.jpg 1\nJos\xe9 2\n", r"a\.txt: line 3: byte 0xe9 is neither UTF-8 nor GBK"),
        (b"a.jpg 0\nb\0.jpg\n", r"a\.txt: line 2: holds zero bytes"),
        (b"\xff\xfea", r"a\.txt: not valid UTF-16-LE at byte 0"),
        (bytes([200, 1, 7]) + bytes(400) + b"\xff\xff\n", r"a\.txt"),
        (gzip.compress(b"a.jpg 0\n", mtime=0), r"a\.txt: a text file was expected; it is gzip data; unpack it first"),
        (b"version https://git-lfs.github.com/spec/v1\n", r"a\.txt: .* git-LFS pointer"),
    ],
)
def test_no_text_is_named(tmp_path, data, message):
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(UserError, match=message):
        read_text(tmp_path / "a.txt")
    with pytest.raises(UserError, match="is a folder; a text file was expected"):
        read_text(tmp_path)
