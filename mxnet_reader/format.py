"""The bytes of a RecordIO file: framing of records, the image header, packing and unpacking.

A record is ``magic, cflag << 29 | length, payload, zero padding to 4 bytes``, little-endian. Where the payload holds
the magic at a multiple of 4, the magic is left out and the record split there (cflag 1 first, 2 middle, 3 last,
0 whole), so that an aligned magic in a file always starts a part.
"""

import struct
from collections import namedtuple
from numbers import Number

import numpy as np

from mxnet_reader.errors import RecordError

MAGIC = 0xCED7230A
MAGIC_BYTES = struct.pack("<I", MAGIC)
MAX_LENGTH = (1 << 29) - 1
WHOLE, FIRST, MIDDLE, LAST = 0, 1, 2, 3
PART_HEADER = struct.Struct("<II")
IMAGE_HEADER = struct.Struct("<IfQQ")

IRHeader = namedtuple("IRHeader", ["flag", "label", "id", "id2"])
IRHeader.__doc__ = "Header of an image record: flag (number of labels, 0 for a scalar), label, id, id2 (high id bits)."


def encode_record(payload: bytes) -> bytes:
    """Frame one payload as mxnet's writer does, multi-part where it holds an aligned magic.

    Raises:
        ValueError: the payload has 2**29 bytes or more.
    """
    size = len(payload)
    if size > MAX_LENGTH:
        raise ValueError(f"a record holds at most {MAX_LENGTH} bytes, got {size}")
    padding = bytes(-size % 4)
    splits = find_aligned_magic(payload)
    if not splits:
        return b"".join((PART_HEADER.pack(MAGIC, size), payload, padding))
    pieces, start = [], 0
    for split in splits:
        pieces += (PART_HEADER.pack(MAGIC, (MIDDLE if start else FIRST) << 29 | split - start), payload[start:split])
        start = split + 4
    pieces += (PART_HEADER.pack(MAGIC, LAST << 29 | size - start), payload[start:], padding)
    return b"".join(pieces)


def find_aligned_magic(payload: bytes) -> list[int]:
    """Offsets, multiples of 4, at which the payload holds the magic."""
    found, position = [], payload.find(MAGIC_BYTES)
    while position >= 0:
        if position % 4 == 0:
            found.append(position)
        position = payload.find(MAGIC_BYTES, position + 1)
    return found


def pack(header: IRHeader, s: bytes) -> bytes:
    """Image header and image bytes as one payload; the flag is set here from the label (scalar 0, array its size)."""
    header = IRHeader(*header)
    label = header.label
    if isinstance(label, Number):
        return IMAGE_HEADER.pack(0, label, header.id, header.id2) + s
    label = np.asarray(label, dtype="<f4")
    return IMAGE_HEADER.pack(label.size, 0, header.id, header.id2) + label.tobytes() + s


def unpack(s: bytes) -> tuple[IRHeader, bytes]:
    """Payload -> (header, image bytes). With ``flag > 0`` the label is a float32 array of that many values.

    Raises:
        RecordError: fewer bytes than the header and its labels need.
    """
    if len(s) < IMAGE_HEADER.size:
        raise RecordError(
            "<payload>", f"an image record starts with {IMAGE_HEADER.size} header bytes, got {len(s)} bytes"
        )
    header = IRHeader(*IMAGE_HEADER.unpack_from(s))
    if header.flag == 0:
        return header, s[IMAGE_HEADER.size :]
    stop = IMAGE_HEADER.size + 4 * header.flag
    if stop > len(s):
        reason = f"the header claims {header.flag} labels, but only {len(s) - IMAGE_HEADER.size} bytes follow it"
        raise RecordError("<payload>", reason)
    return header._replace(label=np.frombuffer(s, "<f4", header.flag, IMAGE_HEADER.size)), s[stop:]


def pack_img(header: IRHeader, img: np.ndarray, quality: int = 95, img_fmt: str = ".jpg") -> bytes:
    """Encode a BGR image (OpenCV's order) and pack it; quality is 1-100 for JPEG, 1-9 (compression) for PNG."""
    import cv2

    options = {".JPG": cv2.IMWRITE_JPEG_QUALITY, ".JPEG": cv2.IMWRITE_JPEG_QUALITY, ".PNG": cv2.IMWRITE_PNG_COMPRESSION}
    option = options.get(img_fmt.upper())
    done, encoded = cv2.imencode(img_fmt, img, [] if option is None else [option, quality])
    if not done:
        raise ValueError(f"OpenCV could not encode an image of shape {np.shape(img)} as {img_fmt}")
    return pack(header, encoded.tobytes())


def unpack_img(s: bytes, iscolor: int = -1) -> tuple[IRHeader, np.ndarray]:
    """Payload -> (header, decoded image, BGR); ``iscolor`` is the flag of ``cv2.imdecode``.

    Raises:
        RecordError: the header is cut, or OpenCV cannot decode the image.
    """
    import cv2

    header, encoded = unpack(s)
    image = cv2.imdecode(np.frombuffer(encoded, np.uint8), iscolor) if encoded else None
    if image is None:
        raise RecordError("<payload>", f"id {header.id}: {len(encoded)} bytes that OpenCV cannot decode as an image")
    return header, image
