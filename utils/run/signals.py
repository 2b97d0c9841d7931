"""SIGTERM and SIGINT ask a run to save and end."""

import signal


class StopSignal:
    """SIGTERM and SIGINT ask the run to save and end after the update at hand; as a context manager it puts back."""

    def __init__(self):
        self.received: str | None = None  # by this rank
        self.agreed = False  # by all ranks, see fetch
        self._before = {}

    def __enter__(self) -> "StopSignal":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame) -> None:
        # Paddle's launcher sends SIGTERM several times; every one means the same.
        self.received = signal.Signals(number).name
