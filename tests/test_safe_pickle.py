"""Foreign pickles: what they may hold comes out as it went in; anything else is refused before it runs."""

import builtins
import collections
import os
import pickle
import pickletools
import struct
import time
import tracemalloc

import numpy as np
import paddle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.errors import UserError
from utils.weights.safe_pickle import SafeUnpickler, UnsafePickleError, load_bin_pickle, load_weights_pickle

pytestmark = pytest.mark.oldest
LOADERS = [load_bin_pickle, load_weights_pickle]


def same(left, right):
    if isinstance(left, np.ndarray):
        return isinstance(right, np.ndarray) and left.dtype == right.dtype and np.array_equal(left, right)
    if isinstance(left, (list, tuple)):
        return type(left) is type(right) and len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    return type(left) is type(right) and left == right


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("shape", [(5, 1), (7,), (0,)])
def test_bin_values(tmp_path, protocol, shape):
    shared = np.arange(int(np.prod(shape)), dtype=np.uint8).reshape(shape)
    value = ([b"jpeg bytes", shared, shared, bytes(range(256)), b""], [True, False, True])
    (tmp_path / "a.bin").write_bytes(pickle.dumps(value, protocol))
    assert same(load_bin_pickle(tmp_path / "a.bin"), value)


def test_python_2_pickles(tmp_path):
    """Written by hand as Python 2's cPickle does at protocols 0 and 2: strings are bytes, arrays have str dtypes."""
    binary = b"\x80\x02]q\x01(U\x04\xff\xd8\x00\x01T\x05\x00\x00\x00abcdee]q\x02(\x88\x89e\x86q\x03."
    text = b"((lp0\nS'\\xff\\xd8'\np1\naS\"it's\"\np2\na(lp3\nI01\naI00\natp4\n."
    array = (
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\nq\x01cnumpy\nndarray\nq\x02K\x00\x85U\x01b\x87Rq\x03"
        b"(K\x01K\x03K\x01\x86cnumpy\ndtype\nq\x04U\x02u1K\x00K\x01\x87Rq\x05(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        b"\x89U\x03\x01\x02\x03tb."
    )
    expected = (
        ([b"\xff\xd8\x00\x01", b"abcde"], [True, False]),
        ([b"\xff\xd8", b"it's"], [True, False]),
        np.array([[1], [2], [3]], np.uint8),
    )
    for data, value in zip((binary, text, array), expected, strict=True):
        assert same(pickle.loads(data, encoding="bytes"), value)  # the hand-written stream is a real one
        (tmp_path / "a.bin").write_bytes(data)
        assert same(load_bin_pickle(tmp_path / "a.bin"), value)


def test_weights_values(tmp_path):
    rng = np.random.default_rng(0)
    kinds = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "?", ">f4", ">i8")
    value = {
        "arrays": [(rng.random((3, 2)) * 9).astype(kind) for kind in kinds],
        "fortran": np.asfortranarray(rng.random((3, 4))),
        "scalar": np.float32(2.5),
        "zero-d": np.array(3.0),
        "empty": np.zeros((0, 5), np.float32),
        "nested": collections.OrderedDict([("a", (1, 2.5, None, "text", -(2**70))), ("b", {"c": [True]})]),
        "large": np.arange(300_000, dtype=np.float32),
    }
    for protocol in range(6):
        (tmp_path / "w.pkl").write_bytes(pickle.dumps(value, protocol))
        found = load_weights_pickle(tmp_path / "w.pkl")
        assert same(found, value) and type(found["nested"]) is collections.OrderedDict
        assert found["scalar"].dtype == np.float32


def test_files_of_paddle_save(tmp_path):
    layer = paddle.nn.Sequential(paddle.nn.Linear(3, 4), paddle.nn.BatchNorm1D(4))
    paddle.save(layer.state_dict(), str(tmp_path / "m.pdparams"))
    found = load_weights_pickle(tmp_path / "m.pdparams")
    for name, tensor in layer.state_dict().items():
        assert np.array_equal(found[name], tensor.numpy())
    paddle.save({"tensor": layer[0].weight, "step": 3}, str(tmp_path / "o.pdparams"))
    found = load_weights_pickle(tmp_path / "o.pdparams")
    array = found["tensor"][1] if isinstance(found["tensor"], tuple) else found["tensor"]
    assert np.array_equal(array, layer[0].weight.numpy()) and found["step"] == 3


class Runs:
    """Unpickles into a call."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def canaries(mark):
    """Payloads that leave ``mark`` behind, or use too much, if any of them runs."""
    touch = f"open({str(mark)!r}, 'w')"
    command = f"touch {mark}"
    array = np.zeros(3, np.uint8)
    inner = pickle.dumps(Runs(os.system, command))
    state = b"cnumpy\nndarray\n(K\x00tR(K\x01K\x01\x85cnumpy\ndtype\n(U\x02O8tR\x89]" + inner[2:-1] + b"atb."
    return {
        "os.system": pickle.dumps(Runs(os.system, command)),
        "os.system in text": f"cos\nsystem\n(S'{command}'\ntR.".encode(),
        "os.system in a list": pickle.dumps(([b"jpeg", Runs(os.system, command)], [True])),
        "inst": f"(S'{command}'\nios\nsystem\n.".encode(),
        "obj": f"(cos\nsystem\nS'{command}'\no.".encode(),
        "newobj": f"\x80\x02cos\nsystem\n(S'{command}'\nt\x81.".encode(),
        "eval": pickle.dumps(Runs(builtins.eval, touch)),
        "exec": pickle.dumps(Runs(builtins.exec, touch)),
        "getattr": pickle.dumps(Runs(getattr, os, "system"))
        if False
        else b"cbuiltins\ngetattr\n(cos\n__dict__\nS'system'\ntR.",
        "copyreg": b"ccopyreg\n__newobj__\n(cio\nBytesIO\nS'x'\ntR.",
        "copyreg text": b"ccopy_reg\n_reconstructor\n(cos\n_Environ\nc__builtin__\nobject\nNtR.",
        "extension": b"\x80\x02\x82\x01.",
        "persistent id": b"Pfile\n.",
        "numpy load": b"cnumpy\nload\n(S'" + str(mark).encode() + b"'\ntR.",
        "numpy runstring": b"cnumpy.testing._private.utils\nrunstring\n(S'" + touch.encode() + b"'\n}tR.",
        "numpy object array": state,
        "numpy f2py": b"cnumpy.f2py.crackfortran\nmyeval\n(S'" + touch.encode() + b"'\ntR.",
        "reduce through numpy": pickle.dumps(np.array([Runs(os.system, command)], dtype=object)),
        "setstate of an array": pickle.dumps(array)[:-1] + b"(cos\nsystem\nS'" + command.encode() + b"'\ntb.",
        "build a name": b"cnumpy\nndarray\n}S'shape'\nK\x01sb.",
        "memmap": b"cnumpy\nmemmap\n(S'" + str(mark).encode() + b"'\ntR.",
        "stack global": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c"
        + bytes([len(command)])
        + command.encode()
        + b"\x85R.",
        "dotted name": b"\x80\x04\x8c\x05numpy\x8c\x0cf2py.sys.exit\x93)R.",
        "bytes of a number": b"\x80\x04c__builtin__\nbytes\n(J\x00\x00\x00\x7ftR.",
        "codec": b"\x80\x02c_codecs\nencode\n(X\x01\x00\x00\x00aX\x03\x00\x00\x00zip" + b"tR.",
    }


@pytest.mark.parametrize("load", LOADERS)
def test_canaries_do_not_sing(tmp_path, load):
    """Files from elsewhere run nothing."""
    mark = tmp_path / "it_ran"
    for name, payload in canaries(mark).items():
        (tmp_path / "a.bin").write_bytes(payload)
        with pytest.raises(UnsafePickleError) as caught:
            load(tmp_path / "a.bin")
        assert not mark.exists(), name
        assert str(tmp_path / "a.bin") in str(caught.value) and "\n" not in str(caught.value), name
    assert issubclass(UnsafePickleError, UserError)


def test_canaries_are_alive(tmp_path):
    """The same payloads under the real unpickler: what this file proves would otherwise be empty."""
    mark = tmp_path / "it_ran"
    for name in ("os.system", "os.system in text", "inst", "obj", "reduce through numpy", "stack global"):
        mark.unlink(missing_ok=True)
        pickle.loads(canaries(mark)[name])
        assert mark.exists(), name


BOMBS = {
    "4 GB of bytes": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 32) + b"x.",
    "2**63 bytes": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 63) + b"x.",
    "4 GB in 32 bits": b"\x80\x03B" + struct.pack("<I", 0xFFFFFFFF) + b"x.",
    "a frame of 4 GB of text": b"\x80\x04\x95"
    + struct.pack("<Q", 1 << 32)
    + b"\x8d"
    + struct.pack("<Q", 1 << 32)
    + b"x.",
    "negative length": b"\x80\x02T" + struct.pack("<i", -5) + b"x.",
    "bytearray": b"\x80\x05\x96" + struct.pack("<Q", 1 << 32) + b"x.",
    "nested lists": b"]" * 30_000 + b"a" * 29_999 + b".",
    "nested tuples": b"(" * 30_000 + b"t" * 30_000 + b".",
    "tuples of one": b")" + b"\x85" * 30_000 + b".",
    "marks": b"(" * 500_000 + b".",
    "stack": b"N" * 600_000 + b".",
    "long line": b"I" + b"9" * 1_000_000 + b"\n.",
    "huge shape": b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    b"(K\x01J\xff\xff\xff\x7fJ\xff\xff\xff\x7f\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R"
    b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x03\x01\x02\x03tb.",
}


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("name", BOMBS)
def test_bombs(tmp_path, load, name):
    (tmp_path / "a.bin").write_bytes(BOMBS[name])
    tracemalloc.start()
    started = time.perf_counter()
    with pytest.raises(UnsafePickleError):
        load(tmp_path / "a.bin")
    seconds, peak = time.perf_counter() - started, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200 << 20 and seconds < 60


def layers(count):
    """A list of two references to a list of two references ...: 2**count leaves in a few bytes."""
    lines = [b"(lp0\nI1\na."]
    for slot in range(count):
        lines.append(b"(lp%d\ng%d\nag%d\na" % (slot + 1, slot, slot))
    return lines[0][:-1] + b"".join(b"0" + line for line in lines[1:]) + b"."


@pytest.mark.parametrize("load", LOADERS)
def test_shared_parts_are_walked_once(tmp_path, load):
    (tmp_path / "a.bin").write_bytes(layers(50))
    found = load(tmp_path / "a.bin")
    for _ in range(50):
        assert found[0] is found[1]
        found = found[0]
    assert found == [1]


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("slots", [True, False], ids=["memo", "keys"])
def test_numbers_of_one_hash_are_refused(tmp_path, load, slots):
    """2**61 - 1 is Python's modulus: multiples of it all hash to 0, and n of them take n * n comparisons."""
    numbers = [b"%d" % ((2**61 - 1) * factor) for factor in range(1, 40_000)]
    body = b"".join(b"p%s\n" % n for n in numbers) if slots else b"".join(b"I%s\nNs" % n for n in numbers)
    (tmp_path / "a.bin").write_bytes(b"}" + body + b".")
    started = time.perf_counter()
    with pytest.raises(UnsafePickleError):
        load(tmp_path / "a.bin")
    assert time.perf_counter() - started < 10


@pytest.mark.parametrize("load", LOADERS)
def test_what_holds_itself_is_refused(tmp_path, load):
    loop = []
    loop.append((loop,))
    (tmp_path / "a.bin").write_bytes(pickle.dumps(loop))
    with pytest.raises(UnsafePickleError, match="part of itself"):
        load(tmp_path / "a.bin")


@pytest.mark.parametrize("protocol", range(6))
def test_labels_as_numpy_has_them(tmp_path, protocol):
    images = [b"a", b"b", b"c", b"d"]
    for same_P in (
        np.array([True, False]), np.array([1, 0], np.int64), np.array([1.0, 0.0]), np.array([1, 0], np.uint8),
        [np.bool_(True), np.bool_(False)], [np.int64(1), np.float32(0)], [1.0, 0.0],
    ):  # fmt: skip
        (tmp_path / "a.bin").write_bytes(pickle.dumps((images, same_P), protocol))
        assert same(load_bin_pickle(tmp_path / "a.bin"), (images, same_P))
    for images in ([np.zeros(3)], np.zeros(3), [np.bool_(True)], [1.5]):  # not among the images
        (tmp_path / "a.bin").write_bytes(pickle.dumps((images, [True]), protocol))
        with pytest.raises(UnsafePickleError):
            load_bin_pickle(tmp_path / "a.bin")


NO_PICKLES = {
    "git-LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
    "HTML page": b"\n<!DOCTYPE html><html><body>Sign in</body></html>",
    "gzip": b"\x1f\x8b\x08\x00data",
    "XML": b"<?xml version='1.0'?><Error/>",
    "empty file": b"",
    "zip archive": b"PK\x03\x04data",
    "tar archive": b"a" * 257 + b"ustar" + b"0" * 300,
    "zeros": bytes(1000),
}


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("what", NO_PICKLES)
def test_other_files_are_named_for_what_they_are(tmp_path, load, what):
    (tmp_path / "lfw.bin").write_bytes(NO_PICKLES[what])
    with pytest.raises(UnsafePickleError, match=f"lfw.bin: .* was expected; it is .*{what}"):
        load(tmp_path / "lfw.bin")


@pytest.mark.parametrize("load", LOADERS)
def test_every_cut_of_a_good_file_is_refused(tmp_path, load):
    data = pickle.dumps(([b"abc", np.arange(9, dtype=np.uint8)], [True]), 4)
    for stop in range(len(data)):
        (tmp_path / "a.bin").write_bytes(data[:stop])
        with pytest.raises(UnsafePickleError):
            load(tmp_path / "a.bin")


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_mutated_pickles_never_run_and_never_crash(tmp_path_factory, data):
    """Any byte changed: a plain value of the allowed types, or the one error."""
    good = bytearray(
        pickle.dumps(([b"abc" * 9, np.arange(9, dtype=np.uint8)], [True, False]), data.draw(st.integers(0, 5)))
    )
    for _ in range(data.draw(st.integers(1, 4))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "fuzz.bin"
    path.write_bytes(good)
    for load in LOADERS:
        try:
            value = load(path)
        except UnsafePickleError:
            continue
        assert isinstance(value, (list, tuple, bytes, bool, int, np.ndarray, dict, str, float, np.generic, type(None)))


def test_bin_policy_is_narrower_than_that_of_weights(tmp_path):
    for value in (
        {"a": 1},
        [1.5],
        ["text"],
        np.zeros(3, np.float32),
        np.zeros(3, np.int64),
        [None],
        b"x" and {"k": b"x"},
    ):
        (tmp_path / "a.bin").write_bytes(pickle.dumps(value))
        load_weights_pickle(tmp_path / "a.bin")
        with pytest.raises(UnsafePickleError):
            load_bin_pickle(tmp_path / "a.bin")


def test_opcodes_of_the_standard_library_are_all_decided():
    """Handled or refused: nothing falls through when Python adds one."""
    refused = {
        "PERSID",
        "BINPERSID",
        "INST",
        "OBJ",
        "NEWOBJ",
        "NEWOBJ_EX",
        "EXT1",
        "EXT2",
        "EXT4",
        "EMPTY_SET",
        "ADDITEMS",
    }
    refused |= {"FROZENSET", "NEXT_BUFFER", "READONLY_BUFFER", "LONG4", "DUP"}
    for opcode in pickletools.opcodes:
        assert (ord(opcode.code) in SafeUnpickler.dispatch) == (opcode.name not in refused), opcode.name
