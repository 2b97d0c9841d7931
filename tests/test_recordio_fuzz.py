"""Differential fuzz against the real mxnet: the same bytes or an error, never other bytes, no crash, no hang.

A corpus file holds a few small records (split ones among them) and its index. Each mutation is one kind of damage. Ours
may refuse where mxnet reads; it may read where mxnet refuses only if it returns the original bytes (cut padding). And
where the damage left a record's payload alone, ours returns the original bytes or an error, whatever mxnet does.
"""

import random

import pytest

from mxnet_reader import RecordError, recordio
from mxnet_reader.format import MAGIC_BYTES, encode_record
from tests.mxnet_peer import Oracle, needs_mxnet

NUM_FILES = 21_000


def corpus_file(rng):
    """(payloads, record spans, file bytes, payload byte ranges of each record)."""
    payloads, spans, ranges, data = [], [], [], b""
    for _ in range(rng.randint(2, 5)):
        payload = rng.randbytes(rng.choice((0, 1, 3, 4, 8, 24, 33, 60)))
        for _ in range(rng.choice((0, 0, 0, 1, 2))):
            place = rng.randrange(0, len(payload) + 1, 1 if rng.random() < 0.3 else 4)
            payload = payload[:place] + MAGIC_BYTES + payload[place:]
        encoded = encode_record(payload)
        ranges.append(payload_bytes(encoded, len(data)))
        payloads.append(payload)
        spans.append((len(data), len(data) + len(encoded)))
        data += encoded
    return payloads, spans, data, ranges


def payload_bytes(encoded, start):
    """Positions in the file that hold payload, not framing."""
    found, position = set(), 0
    while position < len(encoded):
        length = int.from_bytes(encoded[position + 4 : position + 8], "little") & 0x1FFFFFFF
        found |= set(range(start + position + 8, start + position + 8 + length))
        position += 8 + (length + 3 & ~3)
    return found


def mutate(rng, data, offsets):
    """(bytes, offsets, positions changed or None where bytes moved)."""
    data, offsets = bytearray(data), list(offsets)
    kind = rng.randrange(10)
    if kind <= 2:  # framing: magic, cflag or length of some part
        magics = [place for place in range(0, len(data) - 7, 4) if data[place : place + 4] == MAGIC_BYTES]
        place = rng.choice(magics)
        if kind == 0:
            changed = [place + rng.randrange(4)]
            data[changed[0]] ^= 1 << rng.randrange(8)
        elif kind == 1:
            changed = [place + 7]
            data[place + 7] = data[place + 7] & 0x1F | rng.randrange(8) << 5
        else:
            length = rng.choice(
                (rng.randrange(16), rng.randrange(256), rng.randrange(len(data)), rng.randrange(1 << 29))
            )
            word = int.from_bytes(data[place + 4 : place + 8], "little") & 0xE0000000 | length
            data[place + 4 : place + 8] = word.to_bytes(4, "little")
            changed = list(range(place + 4, place + 8))
    elif kind == 3:  # any byte
        changed = [rng.randrange(len(data))]
        data[changed[0]] = rng.randrange(256)
    elif kind == 4:  # a run of bytes
        place = rng.randrange(len(data))
        run = rng.choice((bytes(8), b"\xff" * 8, rng.randbytes(8), MAGIC_BYTES, MAGIC_BYTES + bytes(4)))[
            : len(data) - place
        ]
        data[place : place + len(run)] = run
        changed = list(range(place, place + len(run)))
    elif kind == 5:  # cut
        stop = rng.randrange(len(data))
        changed = list(range(stop, len(data)))
        del data[stop:]
    elif kind == 6:  # garbage behind
        data += rng.choice((b"\n", bytes(rng.randrange(1, 20)), rng.randbytes(rng.randrange(1, 40)), b"some text"))
        changed = []
    elif kind == 7:  # bytes inserted or taken out
        place = rng.randrange(len(data))
        if rng.random() < 0.5:
            data[place:place] = rng.randbytes(rng.choice((1, 4, 8)))
        else:
            del data[place : place + rng.choice((1, 4, 8))]
        return bytes(data), offsets, None
    elif kind == 8:  # an offset of the index
        which = rng.randrange(len(offsets))
        offsets[which] = rng.choice(
            (rng.randrange(len(data) + 40), offsets[which] + rng.choice((-4, 4, 8)), rng.choice(offsets), 10**9)
        )
        return bytes(data), offsets, None
    else:  # two parts exchanged
        first, second = sorted(rng.sample(range(0, len(data), 4), 2))
        data[first : first + 8], data[second : second + 8] = data[second : second + 8], data[first : first + 8]
        return bytes(data), offsets, None
    return bytes(data), offsets, set(changed)


def ours(function, *arguments):
    try:
        return function(*arguments)
    except RecordError as error:
        assert error.path and "\n" not in str(error)
        return error


def check(case, theirs, path, idx_path):
    payloads, ranges, data, keys, changed = case
    path.write_bytes(data)
    by_key, sequence = theirs
    reader = recordio.MXIndexedRecordIO(str(idx_path), str(path), "r")
    by_key = by_key if isinstance(by_key, list) else [(key, by_key) for key in keys]
    for key, their_bytes in by_key:
        our_bytes = ours(reader.read_idx, key)
        assert our_bytes is not None
        if isinstance(our_bytes, RecordError):
            continue
        untouched = changed is not None and not ranges[key] & changed
        if our_bytes != their_bytes:  # we read on where padding is cut; moved bytes may then stand in its place
            assert not isinstance(their_bytes, bytes)
            assert our_bytes == payloads[key] or (changed is None and key == keys[-1] and len(data) % 4)
        if untouched and our_bytes != payloads[key]:
            # no checksum: these two lengths cannot be told from right ones (mxnet believes them as well)
            payload = payloads[key]
            grown = our_bytes[: len(payload)] == payload and our_bytes[len(payload) :] in (b"\0", b"\0\0", b"\0\0\0")
            before_garbage = key == keys[-1] and payload.startswith(our_bytes)
            assert our_bytes == their_bytes and (grown or before_garbage)
    reader.reset()
    known = {item for item in (*sequence, *(found for _, found in by_key)) if isinstance(item, bytes)} | set(payloads)
    for _ in range(len(data) + 2):
        item = ours(reader.read)
        if item is None:
            return
        assert isinstance(item, RecordError) or item in known or (changed is None and len(data) % 4)
    raise AssertionError("read() did not end")


def run_fuzz(tmp_path, num_files, seed):
    rng, corpus, cases = random.Random(seed), [], []
    for _ in range(num_files):
        payloads, spans, data, ranges = corpus_file(rng)
        mutated, offsets, changed = mutate(rng, data, [start for start, _ in spans])
        text = "".join(f"{key}\t{offset}\n" for key, offset in enumerate(offsets))
        keys = list(range(len(payloads)))
        corpus.append((mutated, text, keys))
        cases.append((payloads, ranges, mutated, keys, changed))
    oracle = Oracle()
    answers = oracle.finish(oracle.start("fuzz", corpus, str(tmp_path)))
    oracle.close()
    path, idx_path = tmp_path / "ours.rec", tmp_path / "ours.idx"
    for number, (case, theirs) in enumerate(zip(cases, answers, strict=True)):
        idx_path.write_text(corpus[number][1])
        try:
            check(case, theirs, path, idx_path)
        except Exception as error:
            raise AssertionError(f"file {number} of seed {seed}: {case} {corpus[number][1]!r} {theirs}") from error


@needs_mxnet
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore:.*(are added by a scan|index stays as it is)")
@pytest.mark.parametrize("seed", [0, 1])
def test_mutated_files_read_as_mxnet_does_or_not_at_all(tmp_path, seed):
    run_fuzz(tmp_path, NUM_FILES // 2, seed)


@needs_mxnet
@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.filterwarnings("ignore:.*(are added by a scan|index stays as it is)")
def test_more_mutated_files(tmp_path):
    """200,000 of them, in portions: mxnet runs under a limit on its memory and keeps all its answers."""
    for seed in range(2, 22):
        run_fuzz(tmp_path, 10_000, seed)
