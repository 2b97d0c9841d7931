"""Malformed record files: an error that names file, offset and key, and the good records still read."""

import os
import struct
import time
import tracemalloc

import numpy as np
import pytest

from mxnet_reader import RecordError, recordio
from mxnet_reader.file import RecordFile
from mxnet_reader.format import MAGIC_BYTES, encode_record

PAYLOADS = [bytes([65 + number]) * (40 + 4 * number) for number in range(5)]
OFFSETS = [0, 48, 100, 156, 216]
SIZE = 280


def write(folder, data=None, offsets=OFFSETS):
    data = b"".join(map(encode_record, PAYLOADS)) if data is None else data
    (folder / "a.rec").write_bytes(bytes(data))
    (folder / "a.idx").write_text("".join(f"{key}\t{offset}\n" for key, offset in enumerate(offsets)))
    return recordio.MXIndexedRecordIO(str(folder / "a.idx"), str(folder / "a.rec"), "r")


def good():
    return bytearray(b"".join(map(encode_record, PAYLOADS)))


def read_all(reader):
    """What ``read`` gives until it says None: payloads, and errors in their places."""
    found = []
    for _ in range(50):
        try:
            payload = reader.read()
        except RecordError as error:
            payload = error
        if payload is None:
            return found
        found.append(payload)
    raise AssertionError("read() never ended")


def test_the_file_of_these_tests(tmp_path):
    assert len(good()) == SIZE
    assert [write(tmp_path).idx[key] for key in range(5)] == OFFSETS
    assert read_all(write(tmp_path)) == PAYLOADS


def word(cflag, length):
    return struct.pack("<I", cflag << 29 | length)


DAMAGE = {
    "magic zeroed": (100, bytes(4)),
    "magic bit flipped": (101, bytes([0x22])),
    "magic overwritten": (100, b"\xff\xff\xff\xff"),
    "cflag 4": (104, word(4, 48)),
    "cflag 7": (104, word(7, 48)),
    "middle first": (104, word(2, 48)),
    "last first": (104, word(3, 48)),
    "first without last": (104, word(1, 48)),
    "length past the end": (104, word(0, 5000)),
    "length of half a GiB": (104, word(0, 0x1FFFFFFF)),
    "length swallows the next": (104, word(0, 48 + 8 + 52)),
    "length swallows all": (104, word(0, SIZE - 108)),
    "length too short": (104, word(0, 20)),
    "length zero": (104, word(0, 0)),
    "length not to be joined": (104, word(1, 46)),
}


@pytest.mark.parametrize("what", DAMAGE)
@pytest.mark.parametrize("use_pread", [True, False], ids=["pread", "locked"])
def test_damage_in_the_middle(tmp_path, monkeypatch, what, use_pread):
    if not use_pread:
        monkeypatch.delattr(os, "pread")
    place, replacement = DAMAGE[what]
    data = good()
    data[place : place + len(replacement)] = replacement
    reader = write(tmp_path, data)
    with pytest.raises(RecordError) as caught:
        reader.read_idx(2)
    assert caught.value.offset == 100 and caught.value.key == 2
    for part in (str(tmp_path / "a.rec"), "offset 100", "key 2"):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [reader.read_idx(key) for key in (0, 1, 3, 4)] == [PAYLOADS[key] for key in (0, 1, 3, 4)]
    reader.reset()
    found = read_all(reader)
    errors = [item for item in found if isinstance(item, RecordError)]
    assert errors and all(error.offset == 100 for error in errors)
    assert [item for item in found if isinstance(item, bytes)] == PAYLOADS[:2] + PAYLOADS[3:]


def test_damaged_first_record(tmp_path):
    data = good()
    data[:4] = bytes(4)
    reader = write(tmp_path, data)
    found = read_all(reader)
    assert isinstance(found[0], RecordError) and found[1:] == PAYLOADS[1:]
    (tmp_path / "n.rec").write_bytes(b"this is a text file, not a record file at all")
    with pytest.raises(RecordError, match="offset 0"):
        recordio.MXRecordIO(str(tmp_path / "n.rec"), "r").read()


def test_damaged_last_record_is_no_trailing_garbage(tmp_path):
    for replacement in (bytes(4), b"\x0a\x23\xff\xff", b"abcd"):
        data = good()
        data[216:220] = replacement
        found = read_all(write(tmp_path, data))
        assert found[:4] == PAYLOADS[:4] and isinstance(found[4], RecordError) and len(found) == 5
        with pytest.raises(RecordError, match=r"offset 216, key 4"):
            write(tmp_path, data).read_idx(4)


@pytest.mark.parametrize("cut", range(217, SIZE))
def test_truncated_tail(tmp_path, cut):
    """Every length that the last record can be cut to; only one byte of a magic could as well be a newline."""
    reader = write(tmp_path, good()[:cut])
    with pytest.raises(RecordError, match=r"a\.rec: .*offset 216, key 4"):
        reader.read_idx(4)
    assert [reader.read_idx(key) for key in range(4)] == PAYLOADS[:4]
    reader.reset()
    found = read_all(reader)
    assert found[:4] == PAYLOADS[:4]
    assert len(found) == 4 + (cut > 217)


def test_cut_padding_is_tolerated(tmp_path):
    data = encode_record(b"first") + encode_record(b"a")  # three bytes of padding
    for cut in (1, 2, 3):
        reader = write(tmp_path, data[:-cut], offsets=[0, 16])
        assert reader.read_idx(1) == b"a"
        reader.reset()
        assert read_all(reader) == [b"first", b"a"]


@pytest.mark.parametrize(
    "garbage",
    [b"\n", b"\0", bytes(4), bytes(8), bytes(100), b"garbage", b"end of file, written by some tool\r\n", b"\xff" * 64],
)
def test_trailing_garbage_is_tolerated(tmp_path, garbage):
    reader = write(tmp_path, good() + garbage)
    assert [reader.read_idx(key) for key in range(5)] == PAYLOADS
    reader.reset()
    assert read_all(reader) == PAYLOADS


def test_random_trailing_garbage_is_tolerated(tmp_path):
    rng = np.random.default_rng(0)
    for size in range(1, 200):
        reader = write(tmp_path, good() + rng.bytes(size))
        assert [reader.read_idx(key) for key in range(5)] == PAYLOADS
        reader.reset()
        assert read_all(reader) == PAYLOADS


@pytest.mark.parametrize("offset", [SIZE, SIZE + 4, 10**12, -4, 2**62])
def test_index_points_outside(tmp_path, offset):
    reader = write(tmp_path, offsets=[*OFFSETS, offset])
    with pytest.raises(RecordError, match=rf"a\.rec: .*outside the file \({SIZE} bytes\) \(offset {offset}, key 5\)"):
        reader.read_idx(5)
    assert [reader.read_idx(key) for key in range(5)] == PAYLOADS
    reader.seek(5)
    with pytest.raises(RecordError):
        reader.read()


def test_index_points_into_a_record(tmp_path):
    reader = write(tmp_path, offsets=[0, 48, 120, 156, 216])
    with pytest.raises(RecordError, match=r"bad magic 0x43434343 .*offset 120, key 2"):
        reader.read_idx(2)
    assert [reader.read_idx(key) for key in (0, 1, 3, 4)] == [PAYLOADS[key] for key in (0, 1, 3, 4)]


def test_index_points_into_a_split_record(tmp_path):
    payload = b"head" + MAGIC_BYTES + b"middle.." + MAGIC_BYTES + b"tail"
    reader = write(tmp_path, encode_record(payload) + encode_record(b"good"), offsets=[0, 12, 28, 40])
    assert reader.read_idx(0) == payload and reader.read_idx(3) == b"good"
    for key in (1, 2):
        with pytest.raises(RecordError, match=rf"impossible part .*key {key}"):
            reader.read_idx(key)


def test_split_record_cut_between_its_parts(tmp_path):
    payload = b"head" + MAGIC_BYTES + b"middle.." + MAGIC_BYTES + b"tail"
    encoded = encode_record(payload)
    for cut in range(12, len(encoded)):
        with pytest.raises(RecordError, match="offset 0, key 0"):
            write(tmp_path, encoded[:cut], offsets=[0]).read_idx(0)


def test_split_record_followed_by_a_new_one(tmp_path):
    """A first part and then a whole record: mxnet joins them."""
    data = MAGIC_BYTES + word(1, 4) + b"head" + encode_record(b"whole")
    reader = write(tmp_path, data, offsets=[0, 12])
    with pytest.raises(RecordError, match="impossible part"):
        reader.read_idx(0)
    assert reader.read_idx(1) == b"whole"


def test_claimed_length_allocates_nothing(tmp_path):
    reader = write(tmp_path, MAGIC_BYTES + word(0, 0x1FFFFFFF) + b"x" * 100, offsets=[0])
    tracemalloc.start()
    with pytest.raises(RecordError, match="the file has 108"):
        reader.read_idx(0)
    with pytest.raises(RecordError):
        reader.read()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


@pytest.mark.parametrize("use_pread", [True, False], ids=["pread", "locked"])
def test_truncated_while_open(tmp_path, monkeypatch, use_pread):
    if not use_pread:
        monkeypatch.delattr(os, "pread")
    reader = write(tmp_path)
    assert reader.read_idx(4) == PAYLOADS[4]
    os.truncate(tmp_path / "a.rec", 120)
    with pytest.raises(RecordError, match=r"the file has 120 \(it had 280 when it was opened\).*offset 216, key 4"):
        reader.read_idx(4)
    with pytest.raises(RecordError, match="key 2"):
        reader.read_idx(2)
    assert reader.read_idx(1) == PAYLOADS[1]


def test_file_that_grows_is_read_on(tmp_path):
    path = tmp_path / "a.rec"
    path.write_bytes(encode_record(b"one"))
    reader = recordio.MXRecordIO(str(path), "r")
    assert (reader.read(), reader.read()) == (b"one", None)
    with open(path, "ab") as file:
        file.write(encode_record(b"two"))
    assert (reader.read(), reader.read()) == (b"two", None)


def test_empty_files(tmp_path):
    (tmp_path / "a.rec").write_bytes(b"")
    (tmp_path / "a.idx").write_text("")
    reader = recordio.MXIndexedRecordIO(str(tmp_path / "a.idx"), str(tmp_path / "a.rec"), "r")
    assert reader.read() is None and list(reader.keys) == []


@pytest.mark.parametrize("payload", [b"", b"x" * 23, recordio.pack((0, [1.0, 2.0], 1, 0), b"")[:-1]])
def test_cut_image_header(payload):
    with pytest.raises(RecordError):
        recordio.unpack(payload)


def test_claimed_number_of_labels():
    with pytest.raises(RecordError, match="4294967295 labels"):
        recordio.unpack(struct.pack("<IfQQ", 2**32 - 1, 0, 1, 0) + b"short")


def test_image_that_does_not_decode():
    with pytest.raises(RecordError, match="id 9"):
        recordio.unpack_img(recordio.pack((0, 1.0, 9, 0), b"no image"))
    with pytest.raises(RecordError, match="0 bytes"):
        recordio.unpack_img(recordio.pack((0, 1.0, 9, 0), b""))


def test_long_search_for_the_next_record_is_fast(tmp_path):
    """Damage before 64 MiB without a record: one pass, not one per offset."""
    path = tmp_path / "a.rec"
    path.write_bytes(encode_record(b"one") + b"\x01" * (64 << 20) + encode_record(b"two"))
    started = time.perf_counter()
    reader = recordio.MXRecordIO(str(path), "r")
    found = read_all(reader)
    assert time.perf_counter() - started < 5
    assert isinstance(found[0], (bytes, RecordError)) and found[-1] == b"two"
    with RecordFile(path) as file:
        assert file.find_record(0) == 12 + (64 << 20)
