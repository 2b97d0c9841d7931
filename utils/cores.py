"""How many CPU threads a process may take."""

import os


def num_cores() -> int:
    """Cores this process may use; what the system cannot tell (macOS, Windows) is all of the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_of_rank(world_size: int = 1) -> int:
    """This rank's share of the cores, at least one; ``world_size`` counts where the launcher does not say."""
    return max(1, num_cores() // max(1, int(os.environ.get("PADDLE_LOCAL_SIZE", world_size))))
