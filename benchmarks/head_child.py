"""The loop of a measured child process: one step a line of input, memory as the peak above the imports."""

import json
import os
import sys
import time
from pathlib import Path


def reset_peak() -> int:
    """Forget this process's peak memory; returns what it holds now, bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status_bytes("VmRSS")


def peak_bytes() -> int:
    """Peak memory of this process since ``reset_peak``, bytes."""
    return _status_bytes("VmHWM")


def serve(build, base_bytes: int) -> None:
    """Build a head, answer ``ready``, then run one step for each line read and report it as JSON.

    Args:
        build: returns a function without arguments that runs one step and returns the loss.
        base_bytes: what the process held after its imports.
    """
    step = build()
    reply = os.fdopen(os.dup(1), "w", buffering=1)
    print(json.dumps({"ready": True}), file=reply)
    for _ in sys.stdin:
        start = time.perf_counter()
        loss = step()
        seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "loss": loss, "peak": peak_bytes() - base_bytes}), file=reply)


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")
