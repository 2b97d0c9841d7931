"""Tar shards: the images and labels that Python's tarfile finds, by offset; damage named by shard, member, offset."""

import io
import json
import os
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import cv2
import numpy as np
import pytest

from dataset import build_source, build_train_loader
from utils.data import shards as shards_module
from utils.data.shards import ShardFiles, find_shards
from utils.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.oldest
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def image(seed, suffix=".jpg", size=16):
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return cv2.imencode(suffix, cv2.resize(small, (size, size)))[1].tobytes()


def write_tar(path, members, form=tarfile.PAX_FORMAT, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, options.pop("mode", "w"), format=form) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def sample(key, label, seed, suffix="jpg", how="cls"):
    text = {"cls": b"%d" % label, "txt": b"%d\n" % label, "json": json.dumps({"label": label}).encode()}[how]
    return [(f"{key}.{suffix}", image(seed, f".{suffix}")), (f"{key}.{how}", text)]


def make_set(folder, form=tarfile.PAX_FORMAT, per_shard=(5, 3, 4)):
    seed = 0
    for shard, count in enumerate(per_shard):
        members = []
        for n in range(count):
            suffix, how = ("jpg", "png", "webp")[seed % 3], ("cls", "json", "txt")[seed % 3]
            members += sample(f"p{seed % 4}/img_{n}", seed % 4, seed, suffix, how)
            seed += 1
        write_tar(folder / f"train-{shard:03d}.tar", members, form)
    return folder


def expected(folder):
    """(bytes, label) of every image, by tarfile, in the order of the members within the sorted shards."""
    found = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as archive:
            data = {member.name: archive.extractfile(member).read() for member in archive if member.isfile()}
        for name, content in data.items():
            stem, _, suffix = name.rpartition(".")
            if suffix not in ("cls", "json", "txt"):
                text = next(data[f"{stem}.{kind}"] for kind in ("cls", "json", "txt") if f"{stem}.{kind}" in data)
                value = json.loads(text)
                found.append((content, value["label"] if isinstance(value, dict) else value))
    return found


def contents(source):
    return [(bytes(data), label) for data, label in source.fetch_many(np.arange(len(source)))]


@pytest.mark.parametrize("form", FORMATS)
def test_what_tarfile_finds(tmp_path, form):
    make_set(tmp_path, FORMATS[form])
    source = build_source("wds", root=tmp_path)
    wanted = expected(tmp_path)
    assert len(source) == 12 and contents(source) == wanted and source.num_classes == 4
    assert source.labels.tolist() == [label for _, label in wanted]
    pixels, label = source[7]
    assert label == wanted[7][1] and pixels.dtype == np.uint8
    assert np.array_equal(pixels, cv2.imdecode(np.frombuffer(wanted[7][0], np.uint8), 1)[:, :, ::-1])
    order = np.random.default_rng(0).permutation(12)
    assert [(bytes(d), n) for d, n in source.fetch_many(order)] == [wanted[i] for i in order]


@pytest.mark.parametrize("form", FORMATS)
def test_long_and_foreign_names(tmp_path, form):
    deep = "/".join(["folder_with_a_name"] * 7)  # 132 characters: ustar's prefix, GNU's and pax's long names
    members = sample(f"./{deep}/x", 1, 0) + sample("J.K._Row/J.K._Row_0001", 0, 1) + sample("plain", 1, 3)
    if form != "ustar":
        members += sample("王小明/" + "y" * 300, 2, 2)
    write_tar(tmp_path / "a.tar", members, FORMATS[form])
    source = build_source("wds", root=tmp_path)
    images = [data for name, data in members if name.endswith("jpg")]
    assert contents(source) == list(zip(images, (1, 0, 1, 2), strict=False))
    assert f"member {deep}/x.jpg at offset 0" in source.describe(0)
    if form != "ustar":
        assert f"member 王小明/{'y' * 300}.jpg" in source.describe(3)


def test_labels_where_people_put_them(tmp_path):
    bodies = [
        ("a.jpg", image(0)), ("a.json", b'{"name": "x", "cls": 3}'),
        ("b.JPG", image(1)), ("b.json", b'{"identity": "4"}'), ("b.txt", b"a caption of the picture"),
        ("c.cls", b"1"), ("c.jpeg", image(2)), ("c.txt", b"9"),  # the label may come first; .cls counts
        ("d.png", image(3, ".png")), ("d.txt", b"\xef\xbb\xbf2\r\n"),
        ("e.jpg", image(4)), ("e.json", b"0"),
        ("f.left.jpg", image(5)), ("f.right.jpg", image(6)), ("f.cls", b"0"),  # two images of one sample
        ("g.jpg", image(7)), ("g.json", b'{"label": 2.0}'),
    ]  # fmt: skip
    write_tar(tmp_path / "a.tar", bodies)
    assert build_source("wds", root=tmp_path).labels.tolist() == [3, 4, 1, 2, 0, 0, 0, 2]


def test_what_is_passed_over_is_said(tmp_path):
    members = sample("a", 0, 0) + sample("b", 1, 1)
    members += [("._a.jpg", b"x"), ("__MACOSX/a.jpg", b"x"), ("a.npy", b"x"), ("README", b"x"), ("c.cls", b"5")]
    path = write_tar(tmp_path / "a.tar", members)
    with tarfile.open(path, "a") as archive:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
    for _ in range(2):  # made, and from the stored index
        (note,) = build_source("wds", root=tmp_path).notes
        assert note.startswith(f"{path}: passed over") and "2 hidden (._a.jpg)" in note
        assert "2 members that are neither image nor label (a.npy)" in note and "1 labels without an image (c)" in note


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([*sample("a", 0, 0), ("b.jpg", image(1))], r"member b\.jpg at offset 3072: no label; b\.cls"),
        ([*sample("a", 0, 0), *sample("a", 1, 1, "png")], r"member a\.png at offset 3072: a second image of the key a"),
        ([*sample("a", 0, 0), ("b.jpg", b"")], r"member b\.jpg at offset 3072: an image of 0 bytes"),
        ([("a.cls", b"one"), *sample("a", 0, 0)], r"member a\.cls at offset 0: 'one' is no class number"),
        ([("a.cls", b"-1"), *sample("a", 0, 0)], r"member a\.cls at offset 0: label -1 is no class number"),
        ([("a.cls", b"9" * 23), *sample("a", 0, 0)], r"member a\.cls at offset 0: label 9{23} is no class number"),
        ([("a.json", b"{"), ("a.jpg", image(0))], r"member a\.json at offset 0: no JSON"),
        ([("a.json", b'{"label": true}'), ("a.jpg", image(0))], r"member a\.jpg at offset 1024: no label"),
        ([("a.json", b'{"caption": 3}'), ("a.jpg", image(0))], r"member a\.jpg at offset 1024: no label"),
        ([("a.txt", b"a caption"), ("a.jpg", image(0))], r"member a\.jpg at offset 1024: no label"),
    ],
)
def test_bad_members_are_named(tmp_path, members, message):
    write_tar(tmp_path / "a.tar", members)
    offset = message.replace("3072", str(512 + -(-len(image(0)) // 512) * 512 + 1024))
    with pytest.raises(UserError, match=r"a\.tar: " + offset):
        build_source("wds", root=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]  # nothing half-written


def test_links_are_refused(tmp_path):
    path = write_tar(tmp_path / "a.tar", sample("a", 0, 0))
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("b.jpg")
        link.type, link.linkname = tarfile.LNKTYPE, "a.jpg"
        archive.addfile(link)
    with pytest.raises(UserError, match=r"member b\.jpg at offset \d+: a link"):
        build_source("wds", root=tmp_path)


def test_a_size_that_is_no_number_names_the_shard(tmp_path):
    with tarfile.open(tmp_path / "odd.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        info = tarfile.TarInfo("a.jpg")
        info.size, info.pax_headers = 4, {"size": "-4x"}
        archive.addfile(info, io.BytesIO(b"abcd"))
    with pytest.raises(UserError, match=r"odd\.tar: .*size b'-4x' at offset 0"):
        build_source("wds", root=tmp_path / "odd.tar")


def test_every_cut_is_an_error(tmp_path):
    """Wherever the shard ends early, also between two members: no image is lost in silence."""
    make_set(tmp_path / "whole", per_shard=(3,))
    whole = (tmp_path / "whole" / "train-000.tar").read_bytes()
    with tarfile.open(tmp_path / "whole" / "train-000.tar") as archive:
        last = archive.getmembers()[-1]
    end = last.offset_data + 512
    stops = {1, 511, 512, 513, *range(0, end, 512), *np.random.default_rng(0).integers(0, end, 60).tolist()}
    for stop in sorted(stops):
        (tmp_path / "cut.tar").write_bytes(whole[:stop])
        with pytest.raises(UserError, match=r"cut\.tar: .*(offset \d+)"):
            build_source("wds", root=tmp_path / "cut.tar")


def test_every_damaged_header_byte_is_an_error_or_harmless(tmp_path):
    """A flipped byte anywhere in a header fails the checksum (or more); in an image it may fail to decode."""
    make_set(tmp_path / "whole", tarfile.GNU_FORMAT, per_shard=(2,))
    data = bytearray((tmp_path / "whole" / "train-000.tar").read_bytes())
    with tarfile.open(tmp_path / "whole" / "train-000.tar") as archive:
        headers = [member.offset for member in archive]
    rng = np.random.default_rng(0)
    for place in [offset + int(k) for offset in headers for k in rng.integers(0, 512, 25)]:
        damaged = bytearray(data)
        damaged[place] ^= 1 << int(rng.integers(8))
        (tmp_path / "bad.tar").write_bytes(damaged)
        try:
            build_source("wds", root=tmp_path / "bad.tar")
        except UserError as error:
            assert "bad.tar: " in str(error) and "offset" in str(error)
        else:  # the checksum's own padding
            assert 148 <= (place - max(offset for offset in headers if offset <= place)) < 156


def test_a_damaged_image_names_shard_member_and_offset(tmp_path):
    path = write_tar(tmp_path / "a.tar", sample("p/a", 0, 0) + sample("p/b", 1, 1) + sample("p/c", 2, 2))
    with tarfile.open(path) as archive:
        member = archive.getmember("p/b.jpg")
    with open(path, "r+b") as file:
        file.seek(member.offset_data)
        file.write(b"<html>" * 20)
    source = build_source("wds", root=tmp_path)
    said = rf"a\.tar: member p/b\.jpg at offset {member.offset}: "
    with pytest.raises(UserError, match=said):
        source[1]
    with pytest.raises(UserError, match=said):
        list(build_train_loader(source, 3, image_size=16))
    os.truncate(path, member.offset_data + 100)  # while the source is open
    with pytest.raises(UserError, match=said + "cut"):
        source[1]


def test_index_is_kept_and_checked(tmp_path, monkeypatch):
    make_set(tmp_path)
    seen = []
    index_shard = shards_module.index_shard
    monkeypatch.setattr(shards_module, "index_shard", lambda path: seen.append(path.name) or index_shard(path))
    first = build_source("wds", root=tmp_path)
    assert seen == ["train-000.tar", "train-001.tar", "train-002.tar"] and (tmp_path / ".wds-index").is_file()
    wanted = contents(first)
    assert contents(build_source("wds", root=tmp_path)) == wanted and len(seen) == 3
    part = build_source("wds", root=f"{tmp_path}/train-{{001..002}}.tar")
    assert contents(part) == wanted[5:] and len(seen) == 3
    write_tar(tmp_path / "train-001.tar", sample("new", 3, 50) + sample("newer", 0, 51))
    changed = build_source("wds", root=tmp_path)
    assert seen[3:] == ["train-001.tar"] and contents(changed) == expected(tmp_path)
    os.utime(tmp_path / "train-002.tar", ns=(1, 1))  # same size, another time
    assert contents(build_source("wds", root=tmp_path)) == expected(tmp_path) and seen[4:] == ["train-002.tar"]
    (tmp_path / "train-000.tar").unlink()
    assert contents(build_source("wds", root=tmp_path)) == expected(tmp_path) and len(seen) == 5
    for damage in (b"", b"FACE", (tmp_path / ".wds-index").read_bytes()[:-1]):
        (tmp_path / ".wds-index").write_bytes(damage)
        assert contents(build_source("wds", root=tmp_path)) == expected(tmp_path)


def test_read_only_folders_get_their_index_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = make_set(tmp_path / "set")
    folder.chmod(0o555)
    try:
        wanted = contents(build_source("wds", root=folder))
        assert len(list((tmp_path / "cache" / "arcface-paddle").iterdir())) == 1
        monkeypatch.setattr(shards_module, "index_shard", None)
        assert contents(build_source("wds", root=folder)) == wanted
        assert all(path.suffix == ".tar" for path in folder.iterdir())
    finally:
        folder.chmod(0o755)


def test_ranks_that_start_at_once_make_one_index(tmp_path):
    make_set(tmp_path, per_shard=(20, 20, 20))
    script = (
        "import sys\nfrom utils.data import shards\nmade = []\nold = shards.index_shard\n"
        "shards.index_shard = lambda path: made.append(path) or old(path)\n"
        "from dataset import build_source\nsource = build_source('wds', root=sys.argv[1])\n"
        "print(len(source), sum(label for _, label in source.fetch_many(source.keys)), len(made))"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    ranks = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    answers = [rank.communicate(timeout=90)[0].split() for rank in ranks]
    assert {tuple(answer[:2]) for answer in answers} == {("60", str(15 * 6))}
    assert sum(int(answer[2]) for answer in answers) == 3
    assert sorted(path.name for path in tmp_path.iterdir())[0] == ".wds-index" and len(list(tmp_path.iterdir())) == 4


def test_finding_shards(tmp_path):
    make_set(tmp_path / "a")
    (tmp_path / "a" / "notes.txt").write_text("x")
    (tmp_path / "a" / "._train-000.tar").write_bytes(b"x")
    names = [f"train-{n:03d}.tar" for n in range(3)]
    assert [path.name for path in find_shards(tmp_path / "a")] == names
    assert [path.name for path in find_shards(f"{tmp_path}/a/train-*.tar")] == names
    assert [path.name for path in find_shards(f"{tmp_path}/a/train-{{000..001}}.tar")] == names[:2]
    assert [path.name for path in find_shards(f"{tmp_path}/{{a,a}}/train-{{002,000}}.tar")] == [names[0], names[2]]
    with pytest.raises(UserError, match=r"train-003\.tar: no such shard"):
        find_shards(f"{tmp_path}/a/train-{{000..003}}.tar")
    with pytest.raises(UserError, match="no shard there"):
        find_shards(f"{tmp_path}/a/*.tarx")
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match=r"a folder of \.tar shards"):
        find_shards(tmp_path / "none")


@pytest.mark.parametrize(("suffix", "mode"), [(".tar.gz", "w:gz"), (".tgz", "w:gz"), (".tar.xz", "w:xz")])
def test_compressed_shards_are_refused_with_the_command(tmp_path, suffix, mode):
    path = write_tar(tmp_path / f"a{suffix}", sample("a", 0, 0), mode=mode)
    with pytest.raises(UserError, match=rf"unpack it: (gunzip|unxz) {path}"):
        build_source("wds", root=tmp_path)
    write_tar(tmp_path / "a.tar", sample("a", 0, 0) + sample("b", 1, 1))
    if suffix != ".tgz":
        assert len(build_source("wds", root=tmp_path)) == 2  # unpacked beside it
    (tmp_path / "a.tar").write_bytes(path.read_bytes())  # under a wrong name
    with pytest.raises(UserError, match=r"a\.tar: no tar header: .*at offset 0"):
        build_source("wds", root=tmp_path / "a.tar")


def test_few_files_open_whatever_the_number_of_shards(tmp_path):
    make_set(tmp_path, per_shard=(1,) * 12)
    paths = sorted(tmp_path.glob("*.tar"))
    files = ShardFiles(paths, max_open=3)
    before, failed = len(os.listdir("/proc/self/fd")), []  # noqa: PTH208
    wanted = [path.read_bytes()[:700] for path in paths]

    def work(seed):
        buffer = bytearray(700)
        for which in np.random.default_rng(seed).integers(0, 12, 400).tolist():
            if files.read_into(which, memoryview(buffer), 0) != 700 or bytes(buffer) != wanted[which]:
                failed.append(which)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not failed and len(os.listdir("/proc/self/fd")) <= before + 3  # noqa: PTH208


def test_the_loader_resumes_shards_at_another_world_size(tmp_path):
    """One global permutation, as with records: what two ranks give after a resume is what one would have given."""
    make_set(tmp_path, per_shard=(16, 16, 8))
    source = build_source("wds", root=tmp_path)

    def keys(loader):
        return [loader.last_keys.tolist() for _ in loader]

    alone = build_train_loader(source, 8, image_size=16, seed=5)
    reference = keys(alone)
    assert sorted(key for batch in reference for key in batch) == list(range(40))
    alone = build_train_loader(source, 8, image_size=16, seed=5)
    for _ in zip(range(2), alone, strict=False):
        pass
    ranks = []
    for rank in range(2):
        loader = build_train_loader(source, 4, image_size=16, seed=5, rank=rank, world_size=2)
        loader.load_state_dict(alone.state_dict())
        ranks.append(keys(loader))
    assert [a + b for a, b in zip(*ranks, strict=True)] == reference[2:]
