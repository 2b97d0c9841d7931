"""Are the labels class numbers 0, 1, ... without gaps? And numbering them anew where they are not.

N samples, C classes.
"""

import json
from pathlib import Path

import numpy as np

from utils.data.source import Source
from utils.errors import UserError
from utils.files import write_json, write_text

LABELS_NAME = "labels.json"
EXACT = 1 << 16  # of so many samples all labels are read; of more, where that costs a read each, a part
SAMPLE = 1 << 12


def check_labels(source: Source, place: object, asked: int | None = None, remedy: str = "data.relabel=true") -> None:
    """Refuse labels that would train classes without images, or none of the classes there are.

    All labels are looked at where the source knows them or has few samples, else those of ``SAMPLE`` samples spread
    over the set, of which only what is certain is refused.

    Args:
        source: the data.
        place: its name in messages.
        asked: the number of classes that the user asked for; where the data agree, those without images are meant.
        remedy: the setting or flag that renumbers.

    Raises:
        UserError: labels below 0 or not below the number of classes, gaps, one class alone.
    """
    if source.numbered or len(source) == 0:
        return
    exact = source.labels is not None or len(source) <= EXACT
    samples = None if exact else np.unique(np.linspace(0, len(source) - 1, SAMPLE).astype(np.int64))
    labels = source.read_labels(samples)
    distinct, counts = np.unique(labels, return_counts=True)
    lowest, highest, num_distinct = int(distinct[0]), int(distinct[-1]), len(distinct)
    num_classes = asked or source.num_classes or highest + 1
    if lowest < 0:
        raise UserError(f"{place}: label {lowest} is no class number (0, 1, 2, ...); leave such images out")
    found = f"label {lowest} alone" if num_distinct == 1 else f"labels from {lowest} to {highest}"
    numbers = f"the {num_distinct} labels 0..{num_distinct - 1}"
    if not exact:
        found, numbers = f"{found} in a sample of {len(samples)}", "their labels"
    is_setting = remedy.startswith("data.")
    renumber = f"{'set' if is_setting else 'give'} {remedy} to number {numbers}"
    if highest >= num_classes:
        i = int(np.argmax(labels)) if exact else int(samples[np.argmax(labels)])
        wrong = f"label {highest} of record {source.keys[i]} is not in [0, {num_classes})"
        start = "; labels start at 0" if lowest == 1 else ""
        raise UserError(f"{place}: {wrong} ({found}{start}): {renumber}, or correct the number of classes")
    if asked is not None and source.num_classes in (None, asked):
        return
    num_classes = source.num_classes or num_classes
    if exact and num_distinct == 1 and num_classes == 1:
        raise UserError(f"{place}: all {len(source)} images have one label; at least two identities are needed")
    unseen = np.count_nonzero(counts == 1) / counts.sum()  # Good and Turing: the share of images of other classes
    if (num_distinct < num_classes) if exact else (unseen < 0.01 and 2 * num_distinct < num_classes):
        gap = "labels start at 0" if lowest == 1 and num_distinct == highest else f"that is {num_classes} classes"
        keep = f"; data.num_classes={num_classes} keeps the classes without images"
        advice = renumber + (keep if is_setting and num_classes < 1 << 31 else "")
        raise UserError(f"{place}: {found} ({num_distinct} different ones); {gap}, some without images: {advice}")


def count_classes(source: Source, place: object, asked: int | None) -> int:
    """The number of classes, which data and settings (``asked``) must agree on; labels are checked.

    Raises:
        UserError: they do not agree, neither says, or the labels are no class numbers.
    """
    place = ", ".join(place) if isinstance(place, tuple) else place
    check_labels(source, place, asked)
    found = source.num_classes
    if asked is not None and found is not None and asked != found:
        raise UserError(f"data.num_classes: {asked}, but the data ({place}) has {found} identities; set {found}")
    if asked is None and found is None:
        raise UserError(f"data.num_classes: not set, and the data ({place}) does not say; set it")
    return asked or found


class Relabelled(Source):
    """Another source's samples, its labels numbered 0..C-1 in ascending order.

    ``identities`` [C] are the old labels, or the names that belonged to them.
    """

    def __init__(self, source: Source) -> None:
        self.source, self.keys, self.notes, self.numbered = source, source.keys, source.notes, True
        old = source.read_labels()
        distinct, labels = np.unique(old, return_inverse=True)
        if len(distinct) and distinct[0] < 0:
            i = int(np.argmin(old))
            raise UserError(f"{source.describe(i)}: label {old[i]} is no class number; leave such images out")
        self.labels = labels.astype(np.int32 if len(distinct) < 2**31 else np.int64)
        self.num_classes = len(distinct)
        names = source.identities
        named = range(0 if names is None else len(names))
        self.identities = [names[int(label)] if int(label) in named else int(label) for label in distinct]

    def fetch(self, i: int) -> tuple[bytes | memoryview | np.ndarray, int]:
        return self.source.fetch(i)[0], int(self.labels[i])

    def fetch_many(self, samples: np.ndarray) -> list[tuple[bytes | memoryview | np.ndarray, int]]:
        pairs = zip(self.source.fetch_many(samples), self.labels[samples].tolist(), strict=True)
        return [(data, label) for (data, _), label in pairs]

    def read_labels(self, samples: np.ndarray | None = None) -> np.ndarray:
        return super().read_labels(samples).astype(np.int64)

    def describe(self, i: int) -> str:
        return self.source.describe(i)

    def damaged(self, i: int, reason: str) -> ValueError:
        return self.source.damaged(i, reason)


def save_identities(folder: str | Path, source: Source) -> None:
    """``labels.json`` in a run's folder: what each class is called in the data; none where the number is the name."""
    if source.identities is not None:
        names = [name.item() if isinstance(name, np.generic) else name for name in source.identities]
        write_json(Path(folder) / LABELS_NAME, {"identities": names})


def load_identities(folder: str | Path, num_classes: int | None) -> list | None:
    """What ``save_identities`` stored, or None where there is nothing for so many classes."""
    path = Path(folder) / LABELS_NAME
    if not path.is_file():
        return None
    try:
        identities = json.loads(path.read_text(encoding="utf-8"))["identities"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: damaged, a list of 'identities' was expected; remove it") from None
    return identities if isinstance(identities, list) and len(identities) == num_classes else None


def copy_identities(model: str | Path, folder: str | Path) -> Path | None:
    """Take ``labels.json`` of the run that a model (run, weights or checkpoint file) belongs to along to a folder.

    Returns what was written, or None where the run has none.
    """
    model = Path(model).resolve()
    for place in (model, *model.parents[:3]):  # a checkpoint's files lie three folders deep in the run
        if (place / "config.yaml").is_file():
            found, copy = place / LABELS_NAME, Path(folder).resolve() / LABELS_NAME
            if not found.is_file():
                return None
            if found != copy:
                write_text(copy, found.read_text(encoding="utf-8"))
            return copy
    return None
