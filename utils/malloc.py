"""Keep freed memory in the process: on CPU most of an element-wise operation's time is page faults.

Paddle gives every large tensor a fresh mapping and unmaps it after use, so that each operation pays a page fault for
every 4 KiB it writes (half the time of an element-wise operation, measured). glibc can keep the memory instead.
"""

import ctypes
import os
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_MADV_HUGEPAGE = 14
_HUGE_PAGE = 1 << 21


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


def keep_freed_memory(huge_bytes: int | None = None) -> bool:
    """Tell glibc to serve large blocks from its heap and never to give them back; ask for huge pages there.

    Call it early in a process that trains or embeds on CPU; again does no harm. Peak memory is what the largest step
    needs, plus fragmentation.

    Args:
        huge_bytes: how much address space to mark for huge pages, an eighth of the machine's memory unless told.
            Nothing of it is used until a tensor is.

    Returns:
        True if done, False where the C library is not glibc (nothing happens).
    """
    try:
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version  # noqa: B018 - only glibc has it
    except (OSError, AttributeError):
        return False
    if not (libc.mallopt(_M_MMAP_MAX, 0) and libc.mallopt(_M_TRIM_THRESHOLD, -1)):
        return False
    if huge_bytes is None:
        huge_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 8
    libc.malloc.restype = ctypes.c_void_p
    libc.malloc.argtypes = [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    # Freed again at once, the block stays in the heap (trimming is off) with its advice, untouched.
    block = libc.malloc(huge_bytes)
    if block:
        start = -(-block // _HUGE_PAGE) * _HUGE_PAGE
        size = (block + huge_bytes - start) // _HUGE_PAGE * _HUGE_PAGE
        if size > 0:
            libc.madvise(start, size, _MADV_HUGEPAGE)
        libc.free(block)
    return True
