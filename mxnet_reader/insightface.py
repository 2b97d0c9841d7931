"""Which records of a face data set are images: the layouts that the InsightFace tools and im2rec write.

Record 0 may be a header: flag 2, no image bytes, labels ``[N + 1, N + 1 + identities]``. Then images have the keys 1..N
and identity records (no image bytes either) those from N + 1 on. Without it every record is an image. The labels are
float32, so above 2**24 the header can be off by a few: the border is then looked up in the records themselves.
"""

import struct
from typing import NamedTuple

import numpy as np

from mxnet_reader.errors import RecordError
from mxnet_reader.file import MAX_GUESS, RecordFile
from mxnet_reader.format import IMAGE_HEADER, MAGIC, MAX_LENGTH, PART_HEADER
from mxnet_reader.index import RecordIndex

EXACT = 1 << 24  # above it float32 no longer holds every integer
_LABEL = struct.Struct("<f")
# A record's first bytes: part header, image header, the first of several labels.
_HEAD = np.dtype("<u4, <u4, <u4, <f4, <u8, <u8, <f4")
_HEAD.names = ("magic", "length", "flag", "label", "id", "id2", "first")


class Layout(NamedTuple):
    """Image records of a file.

    Attributes:
        image_keys: int64 [N], ascending under a header record, in index order without.
        has_header: whether record 0 is the InsightFace header.
        num_identities: from the header record, else None (approximate where labels exceed 2**24).
    """

    image_keys: np.ndarray
    has_header: bool
    num_identities: int | None


LABELS_END = 2.0**62  # int64 holds what lies below


def is_identity(payload: bytes) -> bool:
    """True for a header or identity record: flag 2 and nothing behind the two labels."""
    return len(payload) == IMAGE_HEADER.size + 8 and IMAGE_HEADER.unpack_from(payload)[0] == 2


def find_layout(file: RecordFile, index: RecordIndex) -> Layout:
    """Tell images from header and identity records.

    Raises:
        RecordError: record 0 is damaged, or its header contradicts the index.
    """
    header = read_key(file, index, 0) if 0 in index else b""
    if not is_identity(header):
        return Layout(index.unique_keys(), False, None)
    first_identity, stop = np.frombuffer(header, "<f4", 2, IMAGE_HEADER.size).tolist()
    if not (1 <= first_identity <= stop < 2**62):
        offset = index.place(index.row(0))[0]
        raise RecordError(file.path, f"header record with labels [{first_identity}, {stop}]", offset, 0)
    border = int(first_identity)
    if border >= EXACT:
        border = _find_border(file, index, border)
    keys = index.keys_N
    inside = (keys >= 1) & (keys < border)
    if index.first_key is not None:
        image_keys = keys[inside.argmax() : inside.argmax() + int(inside.sum())]
    else:
        image_keys = np.unique(keys[inside])
    return Layout(image_keys, True, int(stop) - int(first_identity))


def _find_border(file: RecordFile, index: RecordIndex, claimed: int) -> int:
    """First identity key near a rounded claim, told by the records (images have bytes, identities none)."""
    slack = 2 * int(np.spacing(np.float32(claimed)))
    for key in range(claimed - slack, claimed + slack + 1):
        if key in index and is_identity(read_key(file, index, key)):
            return key
    return claimed


def read_key(file: RecordFile, index: RecordIndex, key: int) -> bytes:
    """Payload of the record with this key."""
    offset, limit = index.place(index.row(key))
    return file.read_record(offset, key, limit)[0]


def parse_image(payload: bytes | memoryview) -> tuple[int, int]:
    """(where the encoded image starts, label) of an image record's payload; the first label where it has several.

    Raises:
        ValueError: no image record, or a label that is no class number.
    """
    size = len(payload)
    if size < IMAGE_HEADER.size:
        raise ValueError(f"{size} bytes, an image header has {IMAGE_HEADER.size}")
    flag, label, _, _ = IMAGE_HEADER.unpack_from(payload)
    start = IMAGE_HEADER.size + 4 * flag
    if start >= size:
        raise ValueError(f"no image: {flag} labels in a record of {size} bytes")
    if flag:
        (label,) = _LABEL.unpack_from(payload, IMAGE_HEADER.size)
    if not (0 <= label < LABELS_END and label == int(label)):  # false for NaN
        raise ValueError(f"label {label} is not a class number (0, 1, 2, ...)")
    return start, int(label)


def read_plain_images(file: RecordFile, index: RecordIndex, keys: np.ndarray) -> list[tuple[memoryview, int] | None]:
    """(encoded image, label) of each key: what a training loader asks for, in one read and few steps a record.

    None stands for a record that is not plain (several parts, an end that is not where the index has the next record,
    damage): ``RecordFile.read_record`` tells what it is. The views share one piece of memory and keep it alive.
    """
    offset_K, limit_K = index.places(keys)
    size_K = np.clip(limit_K - offset_K, 0, MAX_GUESS)
    view, stop = memoryview(np.empty(size_K.sum(), np.uint8)), 0
    found: list[tuple[memoryview, int] | None] = []
    for offset, size in zip(offset_K.tolist(), size_K.tolist(), strict=True):
        start, stop = stop, stop + size
        block = view[start:stop]
        pair = None
        if size > PART_HEADER.size and file.read_into(block, offset) == size:
            magic, length = PART_HEADER.unpack_from(block)
            end = PART_HEADER.size + length  # a length with a continuation flag is far above the size
            if magic == MAGIC and end + 3 & ~3 == size and not any(block[end:]):
                payload = block[PART_HEADER.size : end]
                try:
                    image, label = parse_image(payload)
                    pair = payload[image:], label
                except ValueError:
                    pass
        found.append(pair)
    return found


def read_plain_labels(file: RecordFile, index: RecordIndex, keys: np.ndarray) -> np.ndarray:
    """Label of each key, int64, from the first bytes of its record; -1 where the whole record has to be looked at."""
    offset_K, _ = index.places(keys)
    head_K = np.zeros(len(keys), _HEAD)
    views = memoryview(head_K.view(np.uint8)).cast("B")
    size = _HEAD.itemsize
    for row, offset in enumerate(offset_K.tolist()):
        file.read_into(views[row * size : (row + 1) * size], offset)
    several_K = head_K["flag"] > 0
    label_K = np.where(several_K, head_K["first"], head_K["label"]).astype(np.float64)
    whole_K = (head_K["magic"] == MAGIC) & (head_K["length"] > IMAGE_HEADER.size + 4 * head_K["flag"].astype(np.int64))
    whole_K &= head_K["length"] <= MAX_LENGTH
    plain_K = whole_K & (label_K >= 0) & (label_K < LABELS_END)
    return np.where(plain_K & (label_K == np.floor(label_K)), np.where(plain_K, label_K, -1), -1).astype(np.int64)
