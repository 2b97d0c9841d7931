"""Several sources as one: labels behind one another or shared, each drawn as often as its weight says.

N samples in all, C classes in all.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np

from utils.data.source import Source
from utils.errors import UserError
from utils.text import read_text_lines


class SeveralSources(Source):
    """The samples of several sources one after the other, without a copy of anything.

    Args:
        sources: the parts.
        names: what each is called, for messages and identities.
        shared: False: every part has people of its own. True: classes of equal name (folder name, or label) are one
            person. A path: lines ``set label person`` with tabs or blanks between (the set's place, from 1; the label
            or folder name in it; any name), which say who is the same; who is not listed is a person of their own.
        weights: how often a sample of each part is drawn in an epoch: 1 once, 2 twice, 0.5 half of them, drawn from
            (seed, epoch); all 1 if empty.

    Raises:
        UserError: weights that do not fit, an identity list that names what is not there.
    """

    def __init__(
        self, sources: Sequence[Source], names: Sequence[str], shared: bool | str = False, weights: Sequence[float] = ()
    ) -> None:
        self.sources, self.names, self.weights = list(sources), list(names), list(weights) or [1.0] * len(sources)
        if len(self.weights) != len(self.sources):
            raise UserError(f"data.weights: {len(self.weights)} weights for {len(sources)} data sets; give one each")
        if not all(math.isfinite(weight) and weight > 0 for weight in self.weights):
            raise UserError(f"data.weights: {self.weights}; numbers above 0 were expected")
        self._starts = np.cumsum([0, *map(len, self.sources)])
        # Of each part: how often all of it is drawn, how many of its samples once more.
        sizes = zip(self.weights, map(len, self.sources), strict=True)
        self._repeats = [(int(weight), round((weight - int(weight)) * size)) for weight, size in sizes]
        self.keys = np.arange(self._starts[-1])
        self.notes = tuple(note for source in self.sources for note in source.notes)
        self._maps, self.identities = _join(self.sources, self.names, shared)
        self.num_classes = len(self.identities)
        self.numbered = all(source.numbered for source in self.sources)
        if all(source.labels is not None for source in self.sources):
            self.labels = np.concatenate([m[s.labels] for m, s in zip(self._maps, self.sources, strict=True)])

    @property
    def num_draws(self) -> int:
        sizes = map(len, self.sources)
        return sum(whole * size + rest for (whole, rest), size in zip(self._repeats, sizes, strict=True))

    def draws(self, seed: int, epoch: int) -> np.ndarray:
        num_samples, parts = len(self), []
        kind = np.int32 if num_samples * math.ceil(max(self.weights)) < 2**31 else np.int64
        for which, (whole, rest) in enumerate(self._repeats):
            own = np.arange(self._starts[which], self._starts[which + 1], dtype=kind)
            parts += [own + kind(again * num_samples) for again in range(whole)]
            chosen = np.random.default_rng((seed, epoch, which, 0x3E16)).permutation(own)[:rest]
            parts.append(chosen + kind(whole * num_samples))
        return np.concatenate(parts)

    def _place(self, i: int) -> tuple[int, int]:
        """(part, its sample) of a sample or of a repeated draw."""
        i = int(i) % len(self)
        which = int(np.searchsorted(self._starts, i, side="right")) - 1
        return which, i - int(self._starts[which])

    def _parts(self, samples: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """(part, rows of ``samples`` that are in it, their samples there)."""
        which_S = np.searchsorted(self._starts, samples, side="right") - 1
        for which in np.unique(which_S).tolist():
            rows = np.flatnonzero(which_S == which)
            yield which, rows, samples[rows] - self._starts[which]

    def fetch(self, i: int) -> tuple[bytes | memoryview | np.ndarray, int]:
        which, own = self._place(i)
        data, label = self.sources[which].fetch(own)
        return data, self._label(which, own, label)

    def fetch_many(self, samples: np.ndarray) -> list[tuple[bytes | memoryview | np.ndarray, int]]:
        found: list = [None] * len(samples)
        for which, rows, own in self._parts(samples % len(self)):
            fetched = self.sources[which].fetch_many(own)
            for row, i, (data, label) in zip(rows.tolist(), own.tolist(), fetched, strict=True):
                found[row] = data, self._label(which, i, label)
        return found

    def _label(self, which: int, own: int, label: int) -> int:
        mapping = self._maps[which]
        if label >= len(mapping):
            raise self.sources[which].damaged(own, f"label {label}, but there are {len(mapping)} classes")
        return int(mapping[label])

    def read_labels(self, samples: np.ndarray | None = None) -> np.ndarray:
        if self.labels is not None:
            return super().read_labels(samples)
        if samples is None:
            return np.concatenate([m[s.read_labels()] for m, s in zip(self._maps, self.sources, strict=True)])
        labels = np.empty(len(samples), np.int64)
        for which, rows, own in self._parts(samples):
            labels[rows] = self._maps[which][self.sources[which].read_labels(own)]
        return labels

    def describe(self, i: int) -> str:
        which, own = self._place(i)
        return self.sources[which].describe(own)

    def damaged(self, i: int, reason: str) -> ValueError:
        which, own = self._place(i)
        return self.sources[which].damaged(own, reason)


def _join(sources: list[Source], names: list[str], shared: bool | str) -> tuple[list[np.ndarray], list[str]]:
    """(for each part: its label -> label of all, int64; what each class is called)."""
    people = [_names_of(source) for source in sources]
    listed = _read_identities(shared, people) if isinstance(shared, str) else {}
    number_of: dict[object, int] = {}
    maps = []
    for which, own in enumerate(people):
        if isinstance(shared, str):
            person = [listed.get((which, name), (names[which], name)) for name in own]
        else:
            person = own if shared else [(names[which], which, name) for name in own]
        maps.append(np.array([number_of.setdefault(each, len(number_of)) for each in person], np.int64))
    return maps, [f"{each[0]}: {each[-1]}" if isinstance(each, tuple) else each for each in number_of]


def _names_of(source: Source) -> list[str]:
    """What the classes of a part are called."""
    if source.identities is not None:
        return [str(name) for name in source.identities]
    num_classes = source.num_classes
    if num_classes is None:
        num_classes = int(source.read_labels().max(initial=-1)) + 1
    return [str(label) for label in range(num_classes)]


def _read_identities(path: str, people: list[list[str]]) -> dict[tuple[int, str], str]:
    """(part, class name in it) -> person."""
    known = [set(own) for own in people]
    listed = {}
    for number, line in enumerate(read_text_lines(path), 1):
        fields = [field.strip() for field in line.split("\t")] if "\t" in line else line.split()
        if not fields or fields == [""]:
            continue
        wanted = f"'set label person' with sets 1..{len(people)} was expected"
        if len(fields) != 3 or not fields[0].isdecimal() or not 1 <= int(fields[0]) <= len(people):
            raise UserError(f"{path}: line {number}: {line.strip()[:80]!r}, {wanted}")
        which, name = int(fields[0]) - 1, fields[1]
        if name not in known[which]:
            raise UserError(f"{path}: line {number}: set {which + 1} has no class {name!r}")
        if listed.setdefault((which, name), fields[2]) != fields[2]:
            found = f"class {name!r} of set {which + 1} is {listed[which, name]!r} above"
            raise UserError(f"{path}: line {number}: {found}")
    return listed
