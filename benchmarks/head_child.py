"""The loop of a measured child process: one step a line of input, memory as the peak above the imports."""

import json
import os
import sys
import time

from utils.system import peak_bytes


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
