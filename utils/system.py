"""What the machine offers a process: cores, device, memory and its peak.

Freed memory is kept in the process where it trains or embeds on CPU: Paddle gives every large tensor a fresh mapping
and unmaps it after use, so that each operation pays a page fault for every 4 KiB it writes (half the time of an
element-wise operation, measured). glibc can keep the memory instead.
"""

import collections
import contextlib
import ctypes
import functools
import math
import mmap
import os
import platform
import sys
from pathlib import Path

import numpy as np

from utils.errors import UserError

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_MADV_HUGEPAGE = 14
_HUGE_PAGE = 1 << 21
# Page-locked arrays on their way up, kept until the copy has surely ended: an update sends fewer than that, and its
# read waits for all of them.
_leaving: collections.deque = collections.deque(maxlen=64)


def num_cores() -> int:
    """Cores this process may use; what the system cannot tell (macOS, Windows) is all of the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ranks_here(world_size: int) -> int:
    """Ranks on this machine; ``world_size`` where the launcher does not say."""
    return max(1, int(os.environ.get("PADDLE_LOCAL_SIZE", world_size)))


def threads_of_rank(world_size: int = 1) -> int:
    """This rank's share of the cores, at least one; ``world_size`` counts where the launcher does not say."""
    return max(1, num_cores() // ranks_here(world_size))


# Compute capabilities that a GPU build has machine code for, by Paddle and CUDA version: read out of the fat binaries
# of the wheel that pip finds by itself, which hold no PTX to compile for others. Builds not listed are not judged.
MACHINE_CODE = {("2.6.2", "11.8"): ((6, 1), (7, 0), (7, 5), (8, 0), (8, 6))}
BF16_CAPABILITY = (8, 0)


def without_machine_code(capability: tuple[int, int], paddle_version: str, cuda_version: str) -> str | None:
    """Why a GPU of this compute capability cannot run a build's kernels, and what to do; None if nothing speaks for it.

    Machine code for X.y runs on X.z with z >= y and on no other X.
    """
    built_for = MACHINE_CODE.get((paddle_version, cuda_version))
    if built_for is None or any(major == capability[0] and minor <= capability[1] for major, minor in built_for):
        return None
    known = ", ".join(f"{major}.{minor}" for major, minor in built_for)
    return (
        f"compute capability {capability[0]}.{capability[1]}, but paddlepaddle-gpu {paddle_version} for CUDA "
        f"{cuda_version} has machine code for {known} alone; install Paddle's build for CUDA 12 (docs/install.md)"
    )


def gpu_capability() -> tuple[int, int] | None:
    """Compute capability of the GPU in use; None where the device is no GPU."""
    import paddle

    place = paddle.get_device()
    return paddle.device.cuda.get_device_capability(place) if place.startswith("gpu") else None


def device_counts() -> dict[str, int]:
    """How many devices of each type the installed Paddle finds on this machine, the type that ``auto`` takes first.

    GPUs and XPUs that this build is for, then the types of device plug-ins (``npu``, ...), then the CPU, which is one.
    """
    import paddle

    device = paddle.device
    counts = {
        "gpu": device.cuda.device_count() if device.is_compiled_with_cuda() else 0,
        "xpu": paddle.base.core.get_xpu_device_count() if device.is_compiled_with_xpu() else 0,
        **collections.Counter(each.split(":")[0] for each in device.get_available_custom_device() or ()),
        "cpu": 1,
    }
    return {name: count for name, count in counts.items() if count}


def pick_device(name: str = "auto") -> str:
    """The device type that a run, an evaluation or a tool asked for; ``auto`` is an accelerator where there is one.

    Raises:
        UserError: Paddle has no such device here.
    """
    import paddle

    found = tuple(device_counts())
    if name == "auto":
        return found[0]
    if name not in found:
        raise UserError(
            f"device {name!r} asked for (run.device, --device), but the installed paddle {paddle.__version__} finds "
            f"{', '.join(found)} here; choose one of these or install the paddle build for {name}"
        )
    return name


def on_cpu() -> bool:
    """Whether new tensors lie in the host's memory."""
    import paddle

    return paddle.get_device() == "cpu"


def choose_convolutions(deterministic: bool) -> None:
    """On a GPU: the fastest algorithm of each convolution, found by trying; or only those that repeat bit for bit.

    Which one is found fastest may differ between two runs, and some add in any order.
    """
    import paddle

    if paddle.get_device().startswith("gpu"):
        flags = {"FLAGS_cudnn_deterministic": deterministic, "FLAGS_cudnn_exhaustive_search": not deterministic}
        paddle.set_flags(flags)


def upload(array):
    """One copy of a numpy array in the memory of Paddle's current device, as a tensor.

    Where CUDA is, it leaves from page-locked memory: the host does not wait for the copy.
    """
    import paddle

    if not paddle.get_device().startswith("gpu"):
        return paddle.to_tensor(array)
    locked = paddle.to_tensor(array, place=paddle.CUDAPinnedPlace())
    _leaving.append(locked)
    return locked.cuda(blocking=False)


def available_memory(device: str, ranks: int = 1) -> float | None:
    """Bytes that one of ``ranks`` processes of this machine may still use: of the GPU all it has, else what Linux has
    free, no more than the control group (a container) allows; None where the system does not tell."""
    import paddle

    if device.startswith("gpu") and paddle.device.is_compiled_with_cuda() and paddle.device.cuda.device_count():
        return float(paddle.device.cuda.get_device_properties().total_memory)
    if device != "cpu" or not Path("/proc/meminfo").exists():
        return None
    free, groups = proc_bytes("meminfo", "MemAvailable"), Path("/sys/fs/cgroup")
    versions = ("memory.max memory.current", "memory/memory.limit_in_bytes memory/memory.usage_in_bytes")
    for limit, used in map(str.split, versions):
        with contextlib.suppress(OSError, ValueError):  # no such version, or "max"
            free = min(free, int((groups / limit).read_text()) - int((groups / used).read_text()))
    return max(0.0, free / max(1, ranks))


def proc_bytes(name: str, field: str) -> int:
    """What Linux says in a line ``field: number kB`` of ``/proc/name``."""
    lines = dict(line.split(":", 1) for line in Path("/proc", name).read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


def peak_memory_mb() -> float:
    """Peak of this process: allocated on an accelerator (NaN where Paddle 2 does not say), resident on CPU."""
    import paddle

    if paddle.get_device().startswith("gpu"):
        return paddle.device.cuda.max_memory_allocated() / 2**20
    if not on_cpu():
        peak = getattr(paddle.device, "max_memory_allocated", None)
        return peak(paddle.get_device()) / 2**20 if peak else math.nan
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def reset_peak() -> int:
    """Forget the peak of this process's resident memory (Linux); returns what it holds now, bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return proc_bytes("self/status", "VmRSS")


def peak_bytes() -> int:
    """Peak of this process's resident memory since ``reset_peak`` (Linux), bytes."""
    return proc_bytes("self/status", "VmHWM")


def advise_huge_pages(address: int, num_bytes: int) -> None:
    """Ask for huge pages in memory that is not written yet; nothing happens where the system has none.

    Rows gathered from gigabytes in pages of 4 KiB cost an address translation each.
    """
    if sys.platform != "linux":
        return
    first, last = -(-address // _HUGE_PAGE) * _HUGE_PAGE, (address + num_bytes) // _HUGE_PAGE * _HUGE_PAGE
    libc = ctypes.CDLL(None)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    if last > first:
        libc.madvise(first, last - first, _MADV_HUGEPAGE)


def release_pages(array: np.ndarray) -> None:
    """Let go of the pages of a file-backed ``np.memmap`` that were read; they stay in the system's cache of files.

    Else a pass over a file fills this process's resident memory with it. Nothing happens to arrays in memory, and where
    the system cannot.
    """
    if isinstance(array.base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED") and not array.flags.writeable:
        array.base.madvise(mmap.MADV_DONTNEED)


def keep_freed_memory() -> bool:
    """Tell glibc to serve large blocks from its heap and never to give them back; ask for huge pages there.

    Call it early in a process that trains or embeds on CPU; again does no harm. Peak memory is what the largest step
    needs, plus fragmentation. False where the C library is not glibc: nothing happens.
    """
    try:
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version  # noqa: B018 - only glibc has it
    except (OSError, AttributeError):
        return False
    if not (libc.mallopt(_M_MMAP_MAX, 0) and libc.mallopt(_M_TRIM_THRESHOLD, -1)):
        return False
    # An eighth of the machine's memory; nothing of it is used until a tensor is.
    num_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 8
    libc.malloc.restype = ctypes.c_void_p
    libc.malloc.argtypes = [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    # Freed again at once, the block stays in the heap (trimming is off) with its advice, untouched.
    block = libc.malloc(num_bytes)
    if block:
        advise_huge_pages(block, num_bytes)
        libc.free(block)
    return True


@functools.cache
def processor() -> tuple[str, frozenset[str]]:
    """(maker and name of the processor, its feature flags); no flags where the system does not list them."""
    name, flags = platform.processor() or platform.machine(), frozenset()
    try:
        with open("/proc/cpuinfo") as file:
            first = file.read().split("\n\n")[0]
    except OSError:  # not Linux
        return name, flags
    told = dict(line.split(":", 1) for line in first.replace("\t", "").splitlines() if ":" in line)
    names = " ".join(told[key].strip() for key in ("vendor_id", "model name") if key in told)
    return names or name, frozenset((told.get("flags") or told.get("Features") or "").split())
