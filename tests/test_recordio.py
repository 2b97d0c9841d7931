"""The drop-in for mxnet.recordio: byte for byte against the real mxnet, and properties of our own."""

import multiprocessing
import os
import pickle
import struct
import threading
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mxnet_reader import MissingKeyError, RecordError, recordio
from mxnet_reader.file import RecordFile
from mxnet_reader.format import MAGIC_BYTES, encode_record
from mxnet_reader.index import read_index
from tests.mxnet_peer import ask_mxnet, needs_mxnet


def sample_payloads(count=60, seed=0):
    """Payloads of every length class; many hold the magic, aligned and not, at the start, end and twice running."""
    rng = np.random.default_rng(seed)
    payloads = [b"", b"a", b"abc", b"abcd", MAGIC_BYTES, MAGIC_BYTES * 2, MAGIC_BYTES * 3 + b"x", b"x" + MAGIC_BYTES]
    payloads += [b"abcd" + MAGIC_BYTES, b"abcd" + MAGIC_BYTES + b"efg", MAGIC_BYTES[:3], MAGIC_BYTES[1:] + MAGIC_BYTES]
    for number in range(count):
        payload = rng.bytes(int(rng.integers(0, 400)))
        for _ in range(number % 4):
            place = int(rng.integers(0, len(payload) + 1))
            payload = payload[:place] + MAGIC_BYTES + payload[place:]
        payloads.append(payload)
    return payloads


def write_pair(folder, items):
    writer = recordio.MXIndexedRecordIO(str(folder / "a.idx"), str(folder / "a.rec"), "w")
    for key, payload in items:
        writer.write_idx(key, payload)
    writer.close()
    return recordio.MXIndexedRecordIO(str(folder / "a.idx"), str(folder / "a.rec"), "r")


@needs_mxnet
def test_writer_is_byte_identical_to_mxnet(tmp_path):
    items = list(enumerate(sample_payloads()))
    write_pair(tmp_path, items)
    ask_mxnet("write", str(tmp_path / "m.rec"), str(tmp_path / "m.idx"), items)
    assert (tmp_path / "a.rec").read_bytes() == (tmp_path / "m.rec").read_bytes()
    assert (tmp_path / "a.idx").read_bytes() == (tmp_path / "m.idx").read_bytes()


@needs_mxnet
def test_each_reads_what_the_other_wrote(tmp_path):
    items = list(enumerate(sample_payloads(seed=1)))
    write_pair(tmp_path, items)
    assert ask_mxnet("read", str(tmp_path / "a.rec"), str(tmp_path / "a.idx")) == items
    assert ask_mxnet("read_sequence", str(tmp_path / "a.rec")) == [payload for _, payload in items]
    ask_mxnet("write", str(tmp_path / "m.rec"), str(tmp_path / "m.idx"), items)
    reader = recordio.MXIndexedRecordIO(str(tmp_path / "m.idx"), str(tmp_path / "m.rec"), "r")
    assert [(key, reader.read_idx(key)) for key in reader.keys] == items


@needs_mxnet
def test_pack_and_unpack_match_mxnet():
    headers = [(0, 4.0, 1, 0), (7, 3, 2**63 + 5, 9), (0, [], 1, 0), (0, [5.0], 3, 0), (2, np.array([1.5, -2.0]), 0, 1)]
    cases = [(header, data) for header in headers for data in (b"", b"abc", MAGIC_BYTES * 2)]
    theirs = ask_mxnet("pack", cases)
    ours = [recordio.pack(recordio.IRHeader(*header), data) for header, data in cases]
    assert ours == theirs
    for payload, (flag, label, id_, id2, data) in zip(ours, ask_mxnet("unpack", ours), strict=True):
        header, rest = recordio.unpack(payload)
        assert (header.flag, header.id, header.id2, rest) == (flag, id_, id2, data)
        assert np.array_equal(np.asarray(header.label), label)
        assert np.asarray(header.label).dtype == (np.float32 if flag else np.float64)


@needs_mxnet
@pytest.mark.parametrize(("suffix", "quality"), [(".jpg", 95), (".JPEG", 60), (".png", 3)])
def test_pack_img_matches_mxnet_up_to_the_encoder(suffix, quality):
    image = cv2.resize(np.random.default_rng(0).integers(0, 255, (8, 8, 3)).astype(np.uint8), (56, 48))
    packed, decoded = ask_mxnet("image_round_trip", image, quality, suffix)
    ours = recordio.pack_img(recordio.IRHeader(0, 3.0, 7, 0), image, quality, suffix)
    assert ours[:24] == packed[:24]
    header, image_back = recordio.unpack_img(ours)
    assert header == (0, 3.0, 7, 0)
    # two builds of OpenCV: their JPEG tables may differ by rounding, their PNG pixels must not
    assert np.abs(image_back.astype(int) - decoded.astype(int)).max() <= (0 if suffix == ".png" else 2)
    assert recordio.unpack_img(packed)[1].shape == image.shape


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.lists(st.sampled_from([MAGIC_BYTES, b"", b"a", b"bc", b"def", b"\0\0\0\0"]), max_size=8), max_size=8)
)
def test_round_trip_of_anything(tmp_path, pieces):
    payloads = [b"".join(part) for part in pieces]
    reader = write_pair(tmp_path, list(enumerate(payloads)))
    assert [reader.read_idx(key) for key in range(len(payloads))] == payloads
    reader.reset()
    assert [reader.read() for _ in payloads] == payloads
    assert reader.read() is None
    assert reader.read() is None


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 2**64 - 1), st.lists(st.floats(width=32, allow_nan=False), max_size=9))
def test_pack_unpack_round_trip(data, identity, label):
    header, rest = recordio.unpack(recordio.pack(recordio.IRHeader(5, label, identity, 1), data))
    assert header.flag == len(label)
    assert rest == data
    assert header.id == identity
    assert header.label == 0 if not label else header.label.tolist() == label


def test_encode_by_hand():
    """The format's definition, written out: magic, cflag << 29 | length, payload, padding."""
    assert encode_record(b"abcde") == MAGIC_BYTES + struct.pack("<I", 5) + b"abcde\0\0\0"
    split = encode_record(b"abcd" + MAGIC_BYTES + b"e")
    first = MAGIC_BYTES + struct.pack("<I", 1 << 29 | 4) + b"abcd"
    assert split == first + MAGIC_BYTES + struct.pack("<I", 3 << 29 | 1) + b"e\0\0\0"


def test_mxnet_interface(tmp_path):
    items = [(key, f"record {key}".encode()) for key in (5, 3, 9)]
    reader = write_pair(tmp_path, items)
    assert reader.keys == [5, 3, 9]
    assert list(reader.keys) == [5, 3, 9]
    assert reader.keys[0] == 5 and reader.keys[-1] == 9 and reader.keys[1:] == [3, 9]
    assert type(next(iter(reader.keys))) is int
    assert 3 in reader.keys and 4 not in reader.keys
    assert np.array(list(reader.keys)).tolist() == [5, 3, 9]
    assert dict(reader.idx) == {5: 0, 3: 16 + 0, 9: 32} and reader.idx[9] == 32 and 4 not in reader.idx
    assert not reader.writable and reader.is_open and reader.flag == "r"
    reader.seek(3)
    assert reader.read() == b"record 3"
    assert reader.read() == b"record 9"
    reader.reset()
    assert reader.read() == b"record 5"
    with pytest.raises(KeyError, match="key 4"):
        reader.read_idx(4)
    assert issubclass(MissingKeyError, RecordError)
    with pytest.raises(ValueError, match="Invalid flag"):
        recordio.MXRecordIO(str(tmp_path / "a.rec"), "a")
    with pytest.raises(FileNotFoundError):
        recordio.MXRecordIO(str(tmp_path / "none.rec"), "r")
    with pytest.raises(ValueError, match="opened with flag"):
        reader.write(b"x")
    reader.close()
    reader.close()
    with pytest.raises(ValueError, match="closed"):
        reader.read()


def test_keys_behave_like_the_list_mxnet_has(tmp_path):
    reader = write_pair(tmp_path, [(key, b"x") for key in (4, 2, 7)])
    keys = reader.keys
    keys.sort()
    assert keys == [2, 4, 7]
    keys.append(1)
    assert keys[3] == 1 and len(keys) == 4


def test_tell_and_reset_of_a_writer(tmp_path):
    writer = recordio.MXIndexedRecordIO(str(tmp_path / "w.idx"), str(tmp_path / "w.rec"), "w")
    assert writer.tell() == 0
    for key, expected in enumerate((16, 32, 48)):
        writer.write_idx(key, b"record_%d" % key)
        assert writer.tell() == expected == 16 * (key + 1)
    writer.reset()  # empties the file
    assert writer.tell() == 0
    writer.write_idx(7, b"again")
    writer.close()
    reader = recordio.MXIndexedRecordIO(str(tmp_path / "w.idx"), str(tmp_path / "w.rec"), "r")
    assert list(reader.keys) == [7] and reader.read_idx(7) == b"again"


def test_other_key_types(tmp_path):
    writer = recordio.MXIndexedRecordIO(str(tmp_path / "w.idx"), str(tmp_path / "w.rec"), "w", key_type=str)
    for key in ("anna", "bert"):
        writer.write_idx(key, key.encode())
    writer.close()
    reader = recordio.MXIndexedRecordIO(str(tmp_path / "w.idx"), str(tmp_path / "w.rec"), "r", key_type=str)
    assert reader.keys == ["anna", "bert"]
    assert reader.read_idx("bert") == b"bert"
    with pytest.raises(KeyError):
        reader.read_idx("carl")


def test_oversized_record_is_refused(tmp_path):
    class Claims(bytes):
        def __len__(self):
            return 1 << 29

    with pytest.raises(ValueError, match=str((1 << 29) - 1)):
        encode_record(Claims(b""))
    with pytest.raises(TypeError):
        recordio.MXRecordIO(str(tmp_path / "w.rec"), "w").write("text")


def test_pickled_reader_reads_on(tmp_path):
    reader = write_pair(tmp_path, [(key, b"record %d" % key) for key in (8, 1, 5)])
    reader.read()
    copy = pickle.loads(pickle.dumps(reader))
    assert copy.read() == b"record 1"  # the position travels
    assert copy.read_idx(5) == b"record 5" and list(copy.keys) == [8, 1, 5]
    assert reader.read_idx(8) == b"record 8"
    reader.close()
    assert not pickle.loads(pickle.dumps(reader)).is_open


def _child(reader, keys, connection):
    connection.send([reader.read_idx(key) for key in keys])


@pytest.mark.parametrize("use_pread", [True, False], ids=["pread", "locked"])
def test_use_after_fork(tmp_path, monkeypatch, use_pread):
    """Parent and children read at the same time through one inherited reader."""
    if not use_pread:
        monkeypatch.delattr(os, "pread")
    payloads = [bytes([key % 256]) * (1000 + key) for key in range(300)]
    reader = write_pair(tmp_path, list(enumerate(payloads)))
    context = multiprocessing.get_context("fork")
    orders = [np.random.default_rng(seed).permutation(300).tolist() * 5 for seed in range(3)]
    children = []
    for order in orders[:2]:
        ours, theirs = context.Pipe()
        process = context.Process(target=_child, args=(reader, order, theirs))
        process.start()
        children.append((process, ours, order))
    assert [reader.read_idx(key) for key in orders[2]] == [payloads[key] for key in orders[2]]
    for process, connection, order in children:
        assert connection.poll(60)
        assert connection.recv() == [payloads[key] for key in order]
        process.join(10)
        assert process.exitcode == 0


def test_writer_refuses_to_write_in_a_forked_child(tmp_path):
    writer = recordio.MXRecordIO(str(tmp_path / "w.rec"), "w")
    writer.write(b"before")
    process_id = os.fork()
    if process_id == 0:
        try:
            writer.write(b"child")
        except RuntimeError:
            writer.close()  # and must not write the parent's buffer a second time
            os._exit(7)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(process_id, 0)[1]) == 7
    writer.write(b"after")
    writer.close()
    reader = recordio.MXRecordIO(str(tmp_path / "w.rec"), "r")
    assert [reader.read() for _ in range(3)] == [b"before", b"after", None]


@pytest.mark.parametrize("use_pread", [True, False], ids=["pread", "locked"])
def test_threads_share_a_reader(tmp_path, monkeypatch, use_pread):
    if not use_pread:
        monkeypatch.delattr(os, "pread")
    payloads = [bytes([key % 256]) * (500 + 7 * key) for key in range(200)]
    reader = write_pair(tmp_path, list(enumerate(payloads)))
    barrier = threading.Barrier(6)

    def work(seed):
        barrier.wait()
        order = np.random.default_rng(seed).permutation(200).tolist() * 4
        return all(reader.read_idx(key) == payloads[key] for key in order)

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(work, range(6)))


def test_offsets_beyond_4_gib(tmp_path, monkeypatch):
    """Sparse file: two records around a hole of 5 GiB, through the index and by a scan of a further record."""
    path, far = tmp_path / "big.rec", 5 << 30
    with open(path, "wb") as file:
        file.write(encode_record(b"near"))
        file.seek(far)
        file.write(encode_record(b"far" + MAGIC_BYTES) + encode_record(b"abcd" + MAGIC_BYTES + b"split"))
    (tmp_path / "big.idx").write_text(f"0\t0\n1\t{far}\n2\t{far + 16}\n")
    assert path.stat().st_blocks * 512 < 1 << 20, "this file system has no holes"
    with monkeypatch.context() as system:
        for _ in range(2):  # and where the system has no positional reads
            with RecordFile(path) as file:
                assert file.read_record(far + 16, limit=None)[0] == b"abcd" + MAGIC_BYTES + b"split"
            system.delattr(os, "pread", raising=False)
    reader = recordio.MXIndexedRecordIO(str(tmp_path / "big.idx"), str(path), "r")
    assert reader.read_idx(2) == b"abcd" + MAGIC_BYTES + b"split"
    assert reader.read_idx(1) == b"far" + MAGIC_BYTES
    assert reader.idx[2] == far + 16
    assert [record.offset for record in reader.handle.scan(far)] == [far, far + 16]


@pytest.mark.parametrize(
    "text",
    [
        "0\t0\n1\t12\n",
        "0\t0\r\n1\t12\r\n",
        "\n0\t0\n\n1\t12\n\n",
        "0\t0\textra\n1\t12\t7\n",
        "0 0\n1\t12",
        "1\t12\n0\t0\n",
    ],
    ids=["plain", "crlf", "blank", "third column", "no last newline", "unordered"],
)
def test_index_dialects(tmp_path, text):
    (tmp_path / "a.rec").write_bytes(encode_record(b"zero") + encode_record(b"one!"))
    (tmp_path / "a.idx").write_text(text, newline="")
    reader = recordio.MXIndexedRecordIO(str(tmp_path / "a.idx"), str(tmp_path / "a.rec"), "r")
    assert sorted(reader.keys) == [0, 1]
    assert (reader.read_idx(0), reader.read_idx(1)) == (b"zero", b"one!")


def test_later_duplicate_wins_as_in_mxnet(tmp_path):
    (tmp_path / "a.rec").write_bytes(encode_record(b"zero") + encode_record(b"one!") + encode_record(b"two!"))
    (tmp_path / "a.idx").write_text("5\t0\n6\t12\n5\t24\n")
    reader = recordio.MXIndexedRecordIO(str(tmp_path / "a.idx"), str(tmp_path / "a.rec"), "r")
    assert list(reader.keys) == [5, 6, 5]
    assert reader.read_idx(5) == b"two!"
    assert len(reader.idx) == 2


def test_large_index_opens_fast_and_small(tmp_path):
    """5.9 million lines in 1 s and 150 MB is the promise; a tenth of it here, in CPU time."""
    import subprocess
    import sys

    count = 590_000
    offsets = np.arange(count, dtype=np.int64) * 9000
    (tmp_path / "a.idx").write_text("".join(f"{key}\t{offset}\n" for key, offset in enumerate(offsets.tolist())))
    script = (
        "import sys, time, mxnet_reader.index as index, numpy\n"
        "def peak(): return int(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1])\n"
        "before = peak()\n"
        "started = time.process_time(); table, whole = index.read_index(sys.argv[1])\n"
        "place = table.place(table.row(123456)); seconds = time.process_time() - started\n"
        "print(len(table), place[0], seconds, (peak() - before) / 1024)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "a.idx"], capture_output=True, text=True, check=True
    )
    rows, offset, seconds, mebibytes = map(float, done.stdout.split())
    assert (rows, offset) == (count, 123456 * 9000)
    assert seconds < 0.6
    assert 9 <= mebibytes < 25  # the arrays alone are 9


def test_index_of_many_shapes():
    from mxnet_reader.index import RecordIndex

    rng = np.random.default_rng(0)
    for keys in (np.arange(50), np.arange(3, 53), rng.permutation(50), rng.integers(0, 20, 50)):
        offsets = np.arange(50) * 8 if rng.random() < 0.5 else rng.permutation(50) * 8
        index = RecordIndex(keys, offsets)
        table = dict(zip(keys.tolist(), offsets.tolist(), strict=True))  # as mxnet builds it
        assert {key: index.place(index.row(key))[0] for key in table} == table
        assert -1 not in index and 99 not in index
        ordered = sorted(set(offsets.tolist()))
        for row, offset in enumerate(offsets.tolist()):
            following = ordered.index(offset) + 1
            assert index.place(row)[1] == (ordered[following] if following < len(ordered) else None)
        assert index.unique_keys().tolist() == list(dict.fromkeys(keys.tolist()))


@pytest.mark.parametrize("text", ["0\tx\n1\t2\n", "a\t0\n", "0\n1\t12\n", "0\t99999999999999999999999\n1\t2\n"])
def test_bad_index_lines_are_named(tmp_path, text):
    (tmp_path / "a.idx").write_text(text)
    with pytest.raises(RecordError, match=r"a\.idx: line 1"):
        read_index(tmp_path / "a.idx")


def test_index_numbers_against_int(tmp_path):
    """Every width of number that an int64 holds, between all separators that occur."""
    rng = np.random.default_rng(0)
    widths = [digits for digits in range(1, 19) for _ in range(9)]
    rows = [
        (int(rng.integers(0, 10**a)), int(rng.integers(0, 10**b))) for a, b in zip(widths, widths[::-1], strict=True)
    ]
    rows += [(-1, 2), (2**63 - 1, 0)]
    for line in ("{}\t{}\n", "{} {}\n", "{}\t{}\r\n", "{}\t{}\t77\n", "\n{}\t{}\n", "  {}\t {} \n"):
        (tmp_path / "a.idx").write_bytes("".join(line.format(*row) for row in rows).encode())
        index, whole = read_index(tmp_path / "a.idx")
        assert whole and list(zip(index.keys_N.tolist(), index.offsets_N.tolist(), strict=True)) == rows


@pytest.mark.parametrize("bad", ["1.0\t2", "1\t2.5", "1\tx", "#1\t2", "1,2", "1e3\t2", f"1\t{2**63}"])
def test_no_line_of_the_index_is_guessed(tmp_path, bad):
    (tmp_path / "a.idx").write_text(f"0\t0\n{bad}\n2\t16\n")
    with pytest.raises(RecordError, match=r"a\.idx: line 2"):
        read_index(tmp_path / "a.idx")


def test_index_of_many_lines(tmp_path):
    offsets = np.cumsum(np.random.default_rng(0).integers(1, 10**6, 40_000))
    (tmp_path / "a.idx").write_text(
        "".join(f"{key}\t{offset}\n" for key, offset in enumerate(offsets.tolist(), 99_990))
    )
    index, whole = read_index(tmp_path / "a.idx")
    assert whole and (index.offsets_N == offsets).all() and (index.keys_N == np.arange(40_000) + 99_990).all()
