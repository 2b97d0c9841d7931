"""Read a whole record set and name everything that is wrong with it."""

import numpy as np

from dataset import FaceRecordDataset
from mxnet_reader import RecordError
from mxnet_reader.insightface import read_key
from tools.rec.write import in_order
from utils.progress import progress


def verify(data: FaceRecordDataset, workers: int = 2, image_size: int | None = None) -> tuple[list[str], str]:
    """Every record, image, label, key and offset.

    Returns:
        (problems, one line each; summary line).
    """
    problems = _check_index(data)
    size = (image_size, image_size) if image_size else data.image_size
    if size == (0, 0):
        size = None

    def check(i: int) -> str | None:
        try:
            image, label = data[i]
        except RecordError as error:
            return str(error)
        if data.num_classes is not None and label >= data.num_classes:
            return f"{data.describe(i)}: label {label}, but there are {data.num_classes} classes"
        if size is not None and image.shape[:2] != tuple(size):
            found = "x".join(map(str, image.shape[:2]))
            return f"{data.describe(i)}: image of {found}, {size[0]}x{size[1]} expected"
        return None

    checks = in_order(check, range(len(data)), workers)
    problems += [problem for problem in progress(checks, len(data), "checking images") if problem]
    summary = f"{data.rec_path}: {data.num_records} records, {len(data)} images, {len(problems)} problems"
    return problems, summary


def _check_index(data: FaceRecordDataset) -> list[str]:
    """Duplicate keys and offsets, records that are not images, records that the index does not know."""
    index, path = data.index, data.rec_path
    problems = []
    keys, counts = np.unique(index.keys_N, return_counts=True)
    problems += [
        f"{index.path}: key {key} occurs {count} times"
        for key, count in zip(keys[counts > 1].tolist(), counts[counts > 1].tolist(), strict=True)
    ]
    order = np.argsort(index.offsets_N, kind="stable")
    offsets = index.offsets_N[order]
    for place in np.flatnonzero(offsets[1:] == offsets[:-1]).tolist():
        pair = sorted((int(index.keys_N[order[place]]), int(index.keys_N[order[place + 1]])))
        problems.append(f"{index.path}: keys {pair[0]} and {pair[1]} have one offset {offsets[place]}")
    known, images = set(offsets.tolist()), set(data.keys.tolist())
    for key in (key for key in keys.tolist() if key not in images):
        try:
            read_key(data.file, index, key)
        except RecordError as error:
            problems.append(str(error))
    damaged: list[RecordError] = []
    for record in data.file.scan(on_error=damaged.append):
        if record.offset not in known:
            problems.append(f"{path}: a record of {record.size} bytes is not in the index (offset {record.offset})")
    problems += [str(error) for error in damaged if error.offset not in known]
    return problems
