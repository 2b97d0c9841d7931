"""tools/gpu_kernels.py: reading Paddle's log and judging it by hand-made cases; a real log of this build."""

import pytest

from tools import gpu_kernels

LOG = """\
I1126 03:30:13.442896 32553 api.cc:88787] matmul API kernel key: [CPU, NCHW, float32]
I1126 03:30:13.442903 32553 api.cc:88794] matmul kernel: {"input":["CPU, NCHW, float32"],"attribute":["bool"]}
I1126 03:30:13.463408 32553 api.cc:56740] full_ API kernel key: [CPU, Undefined(AnyLayout), int64]
I1126 03:30:13.463419 32553 api.cc:56747] full kernel: {"input":["CPU, NCHW, float32"]}
I1126 03:30:13.463419 32553 other.cc:1] a kernel: without a key is no call
"""


def test_the_log_gives_the_kernel_behind_each_call():
    assert gpu_kernels.parse_log(LOG) == {"matmul": {"float32"}, "full": {"int64"}}


def test_missing_kernels_and_types_are_named():
    there = {"matmul": {"float32", "float16"}, "shape": {"Undefined(ALL_DTYPE)"}}
    needed = {"matmul": {"float32", "bfloat16"}, "shape": {"int8"}, "prelu": {"float32"}}
    assert gpu_kernels.missing_kernels(needed, there) == ["matmul (bfloat16)", "prelu (float32)"]


def test_half_precision_is_asked_of_what_auto_cast_casts():
    half = gpu_kernels.in_half_precision({"conv2d_grad": {"float32"}, "softmax": {"float32"}, "slice": {"int64"}})
    assert half == {"conv2d_grad": {"float16", "bfloat16"}}  # softmax stays float32, slice has no floats


def test_a_real_run_is_recorded():
    kernels = gpu_kernels.record(["embed"])
    assert "float32" in kernels["conv2d"] & kernels["batch_norm"]


def test_a_build_without_gpu_says_so(capsys):
    import paddle

    if paddle.device.is_compiled_with_cuda():
        pytest.skip("this Paddle is built for GPUs")
    with pytest.raises(SystemExit):
        gpu_kernels.main([])
    assert "make gpu-kernels" in capsys.readouterr().err
