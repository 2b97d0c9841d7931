"""What the test device counted in this process: copies and bytes in each direction, kernels, collectives, memory."""

import ctypes
import dataclasses
import os
from pathlib import Path

_FIELDS = (
    "h2d_calls", "h2d_bytes", "d2h_calls", "d2h_bytes", "d2d_calls", "d2d_bytes",
    "kernel_calls", "collective_calls", "allocated_bytes", "peak_bytes",
)  # fmt: skip


class _Block(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_int64) for name in _FIELDS)


@dataclasses.dataclass(frozen=True)
class Counts:
    """Calls and bytes since the process began; ``later - earlier`` is what lies between."""

    h2d_calls: int
    h2d_bytes: int
    d2h_calls: int
    d2h_bytes: int
    d2d_calls: int
    d2d_bytes: int
    kernel_calls: int
    collective_calls: int
    allocated_bytes: int
    peak_bytes: int

    @property
    def calls(self) -> int:
        """Everything that the device was asked to do: kernels, copies, collectives."""
        return self.kernel_calls + self.h2d_calls + self.d2h_calls + self.d2d_calls + self.collective_calls

    def __sub__(self, earlier: "Counts") -> "Counts":
        return Counts(*(getattr(self, name) - getattr(earlier, name) for name in _FIELDS))


def loaded() -> bool:
    """Whether this process has the device."""
    return "CUSTOM_DEVICE_ROOT" in os.environ


def library() -> ctypes.CDLL:
    """The plug-in that Paddle has loaded into this process."""
    path = Path(os.environ["CUSTOM_DEVICE_ROOT"]) / "libsandbox.so"
    plugin = ctypes.CDLL(str(path))  # the one that is there already
    plugin.sandbox_counters.restype = ctypes.POINTER(_Block)
    plugin.sandbox_kernel_calls.restype = ctypes.c_int64
    plugin.sandbox_kernel_calls.argtypes = [ctypes.c_char_p]
    plugin.sandbox_kernels.restype = ctypes.c_size_t
    return plugin


def counts() -> Counts:
    """The counters now."""
    block = library().sandbox_counters().contents
    return Counts(*(getattr(block, name) for name in _FIELDS))


def kernel_calls() -> dict[str, int]:
    """Calls of each kernel since the process began."""
    plugin, buffer = library(), ctypes.create_string_buffer(1 << 20)
    plugin.sandbox_kernels(buffer, ctypes.c_size_t(len(buffer)))
    return {name: int(number) for name, number in (line.split() for line in buffer.value.decode().splitlines())}
