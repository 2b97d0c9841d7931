"""One reading of a data set: embeddings, labels, digests of the pixels and thumbnails, all kept on disk.

Legend: N images, D embedding size.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from dataset import Source
from eval.embed import Embedder
from eval.stream import digest, embed_to_file, partial_files
from tools.sources import NetworkImages, pixel_digest
from utils import distributed
from utils.errors import UserError
from utils.files import written_whole
from utils.system import threads_of_rank

THUMBNAIL = 16  # pixels a side


@dataclass(frozen=True)
class Reading:
    """What one reading leaves: all arrays are memory maps."""

    feature_ND: np.ndarray  # float32, embedding plus that of the mirror image, not normalised
    label_N: np.ndarray  # int64
    pixels_N: np.ndarray  # uint64 digest of the decoded image
    thumbnail_NP: np.ndarray  # uint8 [N, 256], grey


def thumbnail(image: np.ndarray) -> np.ndarray:
    """Grey, 16 x 16, as one row of uint8."""
    small = cv2.resize(image, (THUMBNAIL, THUMBNAIL), interpolation=cv2.INTER_AREA)
    return cv2.cvtColor(small, cv2.COLOR_RGB2GRAY).reshape(-1)


def source_stamp(source: Source, root: str | Path) -> str:
    """Tells whether a data set on disk is still the one that was read: its files, sizes and times."""
    if (rec_path := getattr(source, "rec_path", None)) is not None:
        stat = Path(rec_path).stat()
        return digest([Path(rec_path).resolve(), stat.st_size, stat.st_mtime_ns, len(source)])
    time = Path(root).stat().st_mtime_ns if Path(root).exists() else None
    return digest([root, time, *map(source.describe, range(len(source))), len(source)])


def kept_array(path: Path, dtype: type, shape: tuple[int, ...], fill: int = 0) -> np.ndarray:
    """A ``.npy`` file mapped for writing; where there is none, one filled with ``fill`` is made. Every rank enters."""
    with distributed.together():
        if distributed.get_rank() == 0 and not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            with written_whole(path) as aside:
                array = np.lib.format.open_memmap(aside, "w+", dtype, shape)
                array[...] = fill
                array.flush()
    return np.load(path, mmap_mode="r+")


def read_source(source: Source, root: str | Path, embedder: Embedder, folder: Path, resize: bool = False) -> Reading:
    """Embed every image into ``folder``; what is there already from the same data set and weights is used again.

    Every rank enters. An interrupted reading goes on where it stopped.

    Raises:
        UserError: a damaged image, a negative label, an embedding that is not finite.
    """
    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    stamp = source_stamp(source, root)
    folder = folder / digest([stamp, embedder.identity, embedder.embedding_size, resize])
    num_images = len(source)
    features = folder / "features.npy"
    label_N = kept_array(folder / "label.npy", np.int64, (num_images,), -1)
    pixels_N = kept_array(folder / "pixels.npy", np.uint64, (num_images,))
    thumbnail_NP = kept_array(folder / "thumbnail.npy", np.uint8, (num_images, THUMBNAIL**2))

    def get(i: int) -> np.ndarray:
        image, label = source[i]
        if label < 0:
            raise UserError(f"{source.describe(i)}: label {label}; class numbers 0, 1, ... were expected")
        label_N[i] = label
        return image

    def keep(i: int, image: np.ndarray) -> None:
        pixels_N[i], thumbnail_NP[i] = pixel_digest(image), thumbnail(image)

    if not features.is_file():
        images = NetworkImages(get, num_images, embedder.input_size, source.describe, resize, keep)
        try:
            options = {"flip": "add", "key": stamp, "num_threads": max(2, threads_of_rank())}
            embed_to_file(embedder, images, features, name_of=source.describe, **options)
        except Exception:
            if distributed.get_rank() == 0 and not any(path.is_file() for path in partial_files(features)):
                shutil.rmtree(folder)  # nothing to go on with
                for parent in (parent for parent in made if not any(parent.iterdir())):
                    parent.rmdir()
            raise
        distributed.barrier()
        if distributed.get_rank() == 0:
            for i in np.flatnonzero(label_N < 0).tolist():  # lost in a crash of the machine after the embedding
                keep(i, get(i))
            for array in (label_N, pixels_N, thumbnail_NP):
                array.flush()
    return Reading(np.load(features, mmap_mode="r"), label_N, pixels_N, thumbnail_NP)
