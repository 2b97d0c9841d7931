"""Runs inside the environment of the real mxnet 1.9.1 (``.venv-mxnet``); the other side is ``tests/mxnet_peer.py``.

Every line on stdin names a file with a pickled ``(task, arguments)``; the answer is pickled beside it (``.answer``) and
the name is printed back.
"""

import pickle
import resource
import sys
import traceback
from pathlib import Path

import mxnet as mx
import numpy as np

recordio = mx.recordio
for module in ("", ".multiarray", ".numeric"):  # arrays pickled by numpy 2
    sys.modules["numpy._core" + module] = sys.modules["numpy.core" + module]


def write(rec, idx, items):
    writer = recordio.MXIndexedRecordIO(idx, rec, "w")
    for key, payload in items:
        writer.write_idx(key, payload)
    writer.close()


def read(rec, idx, keys=None):
    reader = recordio.MXIndexedRecordIO(idx, rec, "r")
    return [(key, attempt(reader.read_idx, key)) for key in (reader.keys if keys is None else keys)]


def read_sequence(rec):
    reader, found = recordio.MXRecordIO(rec, "r"), []
    while True:
        item = attempt(reader.read)
        if item is None or isinstance(item, tuple):
            return found if item is None else [*found, item]
        found.append(item)


def attempt(function, *arguments):
    """Bytes, None, or ("error", message)."""
    try:
        return function(*arguments)
    except Exception as error:
        return ("error", f"{type(error).__name__}: {str(error).splitlines()[-1:]}")


def pack(headers_and_bytes):
    return [recordio.pack(recordio.IRHeader(*header), data) for header, data in headers_and_bytes]


def unpack(payloads):
    found = []
    for payload in payloads:
        header, data = recordio.unpack(payload)
        found.append((header.flag, np.asarray(header.label), header.id, header.id2, data))
    return found


def image_round_trip(image, quality, suffix):
    packed = recordio.pack_img(recordio.IRHeader(0, 3.0, 7, 0), image, quality, suffix)
    return packed, recordio.unpack_img(packed)[1]


def decode(payloads):
    """mx.image.imdecode of each record's image: RGB, orientation tags ignored."""
    return [mx.image.imdecode(recordio.unpack(payload)[1]).asnumpy() for payload in payloads]


def fuzz(corpus, folder):
    """For every (rec bytes, idx text): what mxnet reads by key, and in sequence."""
    rec, idx = str(Path(folder) / "oracle.rec"), str(Path(folder) / "oracle.idx")
    write(rec, idx, [(0, b"warm up")])
    read(rec, idx)
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    # mxnet allocates whatever length a record claims, up to 512 MiB; refuse it quickly
    resource.setrlimit(resource.RLIMIT_AS, (used + (48 << 20),) * 2)
    found = []
    for rec_bytes, idx_text, keys in corpus:
        with open(rec, "wb") as file:
            file.write(rec_bytes)
        with open(idx, "w") as file:
            file.write(idx_text)
        found.append((attempt(read, rec, idx, keys), attempt(read_sequence, rec)))
    return found


TASKS = {
    function.__name__: function
    for function in (write, read, read_sequence, pack, unpack, image_round_trip, decode, fuzz)
}

if __name__ == "__main__":
    for line in sys.stdin:
        request = Path(line.strip())
        try:
            task, arguments = pickle.loads(request.read_bytes())
            answer = (True, TASKS[task](*arguments))
        except Exception:
            answer = (False, traceback.format_exc())
        request.with_suffix(".answer").write_bytes(pickle.dumps(answer, protocol=4))
        print("answered", request, flush=True)
