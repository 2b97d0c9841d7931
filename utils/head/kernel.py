"""Which implementation of the head's chunk arithmetic runs here."""

import paddle

from utils.errors import UserError
from utils.head.numpy_kernel import NumpyKernel
from utils.head.paddle_kernel import PaddleKernel
from utils.head.protocol import Kernel
from utils.system import threads_of_rank


def build_kernel(
    *, backend: str, matmul_dtype: str, num_threads: int | None, chunk_rows: int | None, world_size: int
) -> Kernel:
    """The kernel that ``PartialFC``'s arguments of the same names ask for, on the current device.

    Raises:
        UserError: an unknown name, or one that does not work on this device.
    """
    on_cpu = paddle.get_device() == "cpu"
    if backend not in ("auto", "paddle", "numpy"):
        raise UserError(f"backend: {backend!r} is not one of auto, paddle, numpy")
    if backend == "numpy" and not on_cpu:
        raise UserError(f"backend: 'numpy' works on CPU, the device is {paddle.get_device()}")
    if on_cpu and matmul_dtype not in ("fp32", "tf32"):  # tf32 allows what a CPU need not make use of
        raise UserError(f"matmul_dtype: {matmul_dtype!r} needs a GPU; on CPU use 'fp32'")
    if backend == "numpy" or (backend == "auto" and on_cpu):
        return NumpyKernel(num_threads or threads_of_rank(world_size), chunk_rows or 4096)
    return PaddleKernel(chunk_rows or (4096 if on_cpu else 16384), matmul_dtype)
