"""One progress bar, with rate and time left, on stderr so that piped tables stay clean; silent where nobody watches."""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text


class RateColumn(ProgressColumn):
    """Items a second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f}/s")


def build_bar(enabled: bool = True, with_line: bool = False) -> Progress:
    """A bar on stderr that is not started yet: description, done of total, rate, time left.

    ``with_line``: a short one on stdout, which ends in its task's field ``line`` instead of description and rate.
    """
    counts = BarColumn(20 if with_line else 40), MofNCompleteColumn()
    if with_line:
        columns = (*counts, TimeRemainingColumn(), TextColumn("{task.fields[line]}"))
    else:
        columns = (TextColumn("{task.description}"), *counts, RateColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=not with_line), disable=not enabled)


@contextmanager
def progress_bar(what: str, total: int, done: int = 0, enabled: bool | None = None) -> Iterator[Callable[[int], None]]:
    """Yields ``advance(count)``; ``done`` counts earlier work. ``enabled``: None draws where stderr is a terminal."""
    enabled = sys.stderr.isatty() if enabled is None else enabled
    with build_bar(enabled) as bar:
        task = bar.add_task(what, total=total, completed=done)
        yield lambda count=1: bar.advance(task, count)


def progress(items: Iterable, total: int, what: str, done: int = 0) -> Iterator:
    """Pass items on and draw a bar: ``what``, done of total, rate, time left."""
    with progress_bar(what, total, done) as advance:
        for item in items:
            yield item
            advance(1)
