"""Which implementation of the head's chunk arithmetic runs here."""

import importlib.util

import paddle

from utils.errors import UserError
from utils.head.numpy_kernel import NumpyKernel
from utils.head.paddle_kernel import PaddleKernel
from utils.head.protocol import Kernel
from utils.system import threads_of_rank

BACKENDS = ("auto", "paddle", "numpy", "numba")
NUMBA_CLASSES = 20_000  # from here on a run of a few steps saves more than the second and a half that compiling takes


def has_numba() -> bool:
    """Whether the fused passes can be had here."""
    return importlib.util.find_spec("numba") is not None


def takes_numba(num_classes: int) -> bool:
    """Whether ``auto`` fuses its passes on CPU. Judged by the classes of all ranks: the same at any number of them."""
    return num_classes >= NUMBA_CLASSES and has_numba()


def build_kernel(
    *,
    backend: str,
    matmul_dtype: str,
    num_threads: int | None,
    chunk_rows: int | None,
    num_classes: int,
    world_size: int,
) -> Kernel:
    """The kernel that ``PartialFC``'s arguments of the same names ask for, on the current device.

    Raises:
        UserError: an unknown name, or one that does not work on this device.
    """
    on_cpu = paddle.get_device() == "cpu"
    if backend not in BACKENDS:
        raise UserError(f"backend: {backend!r} is not one of {', '.join(BACKENDS)}")
    if backend in ("numpy", "numba") and not on_cpu:
        raise UserError(f"backend: {backend!r} works on CPU, the device is {paddle.get_device()}")
    if backend == "numba" and not has_numba():
        raise UserError("backend: 'numba' needs the package numba: pip install numba, or use 'numpy'")
    if on_cpu and matmul_dtype not in ("fp32", "tf32"):  # tf32 allows what a CPU need not make use of
        raise UserError(f"matmul_dtype: {matmul_dtype!r} needs a GPU; on CPU use 'fp32'")
    if backend in ("numpy", "numba") or (backend == "auto" and on_cpu):
        num_threads, chunk_rows = num_threads or threads_of_rank(world_size), chunk_rows or 4096
        if backend == "numba" or (backend == "auto" and takes_numba(num_classes)):
            from utils.head.numba_kernel import NumbaKernel

            return NumbaKernel(num_threads, chunk_rows)
        return NumpyKernel(num_threads, chunk_rows)
    return PaddleKernel(chunk_rows or (4096 if on_cpu else 16384), matmul_dtype)
