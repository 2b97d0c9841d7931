"""The only caller of collectives: one code path for gloo (CPU) and NCCL (GPU).

Every message of one update, W ranks, B samples of a rank, G = W B, D embedding size, P backbone parameters, R running
statistics, k micro-batches. Bytes are what a rank contributes; what a ring sends is (W - 1) / W of the result for a
gather or a scatter, twice that for a reduction.

    when                   what                               call                   bytes             among
    fetch, one update      flags (failed, stopping, saving),  gather_host            8 (4 + k B)       hosts (gloo)
    ahead                  labels
    forward, k times       embeddings                         all_gather_rows        4 B D             devices
                           largest logits, sums of            all_gather_rows        12 G              devices
                           exponentials, target logits
    backward, k times      gradients of the embeddings        reduce_scatter_rows    4 G (D + 1)       devices
    last backward          gradients of the backbone          DataParallel, or       4 P               devices
                                                              average_gradients
    report                 loss, squared norm, finiteness,    sum_figures            8 (3 + R)         devices
                           running statistics
    on a logged line       cosines to own, nearest class      all_reduce_sum, _max   8 G               devices
    on a spike or a skip   keys of the records                all_gather_object      8 B k             hosts

gloo has no reduce_scatter: on CPU the gradients of the embeddings are summed whole and cut. Flags are numbers in the
first message: a rank that failed, was signalled or could not save says so there, and all learn of it before a
collective of the update; whether to skip comes out of the report, the same bits on all ranks.

Every function is an identity (or a plain local computation) in a single process, so callers need no ``if``.
Nothing here is differentiable: the head computes its gradients in closed form and calls these inside its own backward.
All ranks must enter each call, in the same order.

Shapes: W world size, B rows of one rank (the same on every rank), ``...`` any trailing shape.
"""

import contextlib
import os
import pickle
from collections.abc import Iterator

import numpy as np
import paddle
import paddle.distributed as dist

from utils.errors import UserError
from utils.system import gpu_capability, pick_device, without_machine_code

_host_group: dist.communication.group.Group | None = None  # gloo beside the device's own; None: the default one is it


def init(device: str = "cpu") -> str:
    """Select the device (returned is its type); join the process group if the launcher started several processes.

    Args:
        device: a type that ``utils.system.pick_device`` knows, or ``auto``. Its index is taken from the launcher.

    Raises:
        UserError: Paddle has no such device here, or no machine code for it.
    """
    device = pick_device(device)
    selected = os.environ.get(f"FLAGS_selected_{device}s", "0").split(",")[0]
    paddle.set_device("cpu" if device == "cpu" else f"{device}:{selected}")
    if device == "gpu":
        problem = without_machine_code(gpu_capability(), paddle.__version__, str(paddle.version.cuda()))
        if problem:
            raise UserError(f"run.device: gpu: {problem}")
    if _launched() and not dist.is_initialized():
        if device == "cpu":
            # Without a backend named, a CUDA build of Paddle would pick NCCL for CPU tensors.
            os.environ.setdefault("PADDLE_DISTRI_BACKEND", "gloo")
        dist.init_parallel_env()
        if device != "cpu":
            global _host_group
            _host_group = dist.new_group(backend="gloo")
    return device


def _launched() -> bool:
    """Whether the launcher started several ranks; its number alone, left over in a shell, would wait for them forever.

    Raises:
        UserError: the launcher's variables do not belong together.
    """
    told = os.environ.get("PADDLE_TRAINERS_NUM", "1")
    if told in ("", "1"):
        return False
    needed = ("PADDLE_TRAINER_ID", "PADDLE_CURRENT_ENDPOINT", "PADDLE_TRAINER_ENDPOINTS")
    missing = [name for name in needed if not os.environ.get(name)]
    endpoints = os.environ.get("PADDLE_TRAINER_ENDPOINTS", "").split(",")
    if missing or not told.isdecimal() or len(endpoints) != int(told):
        why = f"{missing[0]} is not set" if missing else f"PADDLE_TRAINER_ENDPOINTS names {len(endpoints)}"
        raise UserError(
            f"PADDLE_TRAINERS_NUM={told} in the environment, but {why}: left over from another run? unset "
            "PADDLE_TRAINERS_NUM for one process, or start the ranks with python -m paddle.distributed.launch"
        )
    return True


def get_rank() -> int:
    """This process's global rank, 0 in a single process."""
    return dist.get_rank() if dist.is_initialized() else 0


def get_world_size() -> int:
    """Number of processes W, 1 in a single process."""
    return dist.get_world_size() if dist.is_initialized() else 1


def gather_host(values: np.ndarray) -> np.ndarray:
    """Integers [n] of every rank -> [W, n] int64 in rank order; n equal on all ranks. Host memory to host memory.

    No device takes part: what ranks tell each other about the next update does not wait for the present one.
    """
    values = np.asarray(values, np.int64)
    if get_world_size() == 1:
        return values[None]
    table = np.zeros([get_world_size(), len(values)], np.int64)
    table[get_rank()] = values
    shared = paddle.to_tensor(table, place=paddle.CPUPlace())
    dist.all_reduce(shared, group=_host_group)
    return shared.numpy()


def all_reduce_sum(tensor: paddle.Tensor) -> paddle.Tensor:
    """Element-wise sum over ranks, as a new tensor of the same shape and dtype."""
    return _all_reduce(tensor, dist.ReduceOp.SUM)


def all_reduce_max(tensor: paddle.Tensor) -> paddle.Tensor:
    """Element-wise maximum over ranks, as a new tensor of the same shape and dtype."""
    return _all_reduce(tensor, dist.ReduceOp.MAX)


def _all_reduce(tensor: paddle.Tensor, operation: int) -> paddle.Tensor:
    if get_world_size() == 1:
        return tensor.detach()
    output = tensor.detach().clone()
    dist.all_reduce(output, op=operation)
    return output


def all_gather_rows(tensor: paddle.Tensor) -> paddle.Tensor:
    """[B, ...] of every rank -> [W*B, ...] in rank order; B must be equal on all ranks."""
    if get_world_size() == 1:
        return tensor.detach()
    parts = []
    dist.all_gather(parts, tensor.detach().contiguous())
    return paddle.concat(parts, axis=0)


def reduce_scatter_rows(tensor: paddle.Tensor) -> paddle.Tensor:
    """[W*B, ...] on every rank -> this rank's [B, ...] rows of the sum over ranks."""
    world_size = get_world_size()
    if world_size == 1:
        return tensor.detach()
    num_rows, remainder = divmod(tensor.shape[0], world_size)
    if remainder:
        raise ValueError(f"reduce_scatter_rows: {tensor.shape[0]} rows do not divide by {world_size} ranks")
    if not tensor.place.is_cpu_place():
        output = paddle.empty([num_rows, *tensor.shape[1:]], dtype=tensor.dtype)
        dist.reduce_scatter(output, tensor.detach().contiguous())
        return output
    return all_reduce_sum(tensor)[get_rank() * num_rows :][:num_rows]  # gloo has no such collective


def sum_figures(values: list, along: paddle.Tensor | None = None) -> tuple[paddle.Tensor, paddle.Tensor | None]:
    """Sums over ranks of numbers and one-element tensors, float64 [n] on the device: one message, and nothing waits.

    inf and NaN of any rank stay. The sums are the same bits on all ranks.

    Args:
        along: a vector that travels in the same message; its sum over ranks, in float64, is the second result.
    """
    parts = [
        v.astype("float64").reshape([1]) if isinstance(v, paddle.Tensor) else paddle.full([1], v, "float64")
        for v in values
    ]
    if along is None or get_world_size() == 1:
        return all_reduce_sum(paddle.concat(parts)), along
    return paddle.split(all_reduce_sum(paddle.concat([*parts, along.astype("float64")])), [len(values), len(along)])


def average_gradients(parameters: list[paddle.Tensor]) -> None:
    """Replace each parameter's gradient by its mean over ranks, many of them in one message."""
    if get_world_size() > 1:
        from paddle.distributed.fleet.utils.hybrid_parallel_util import fused_allreduce_gradients

        fused_allreduce_gradients(parameters, None)


def all_gather_object(value: object) -> list:
    """Small picklable values of all ranks in rank order (between our own processes only, never from files)."""
    if get_world_size() == 1:
        return [value]
    payload = np.frombuffer(pickle.dumps(value), np.uint8)
    sizes = gather_host([len(payload)])[:, 0]
    padded = np.zeros(int(sizes.max()), np.int64)
    padded[: len(payload)] = payload
    rows = gather_host(padded)
    return [pickle.loads(row[:size].astype(np.uint8).tobytes()) for row, size in zip(rows, sizes, strict=True)]


def broadcast_object(value: object, src: int = 0) -> object:
    """A small picklable value of rank ``src`` on every rank."""
    return all_gather_object(value if get_rank() == src else None)[src]


def barrier() -> None:
    """Wait until every rank is here."""
    gather_host([0])


def agree(*flags: bool) -> tuple[bool, ...]:
    """Each flag is true on every rank if it is on one; one collective for all of them. All ranks call it."""
    return tuple(gather_host([int(bool(flag)) for flag in flags]).any(axis=0).tolist())


@contextlib.contextmanager
def together() -> Iterator[None]:
    """What a user can mend (``UserError``, ``OSError``), if it fails inside on one rank, ends all ranks with a message.

    No collectives inside. All ranks call it. Anything else is a bug and keeps its traceback: the other ranks learn of
    it from the missing heartbeat.
    """
    error = None
    try:
        yield
    except (UserError, OSError) as failure:
        error = failure
    raise_together(error)


def raise_together(error: Exception | None) -> None:
    """All ranks call this after a step that may fail on some of them; all end if one failed.

    A failing rank raises its own error. The others raise a ``UserError`` that names the rank and repeats its message,
    instead of waiting in the next collective for a process that is gone.
    """
    messages = all_gather_object(None if error is None else str(error)) if agree(error is not None)[0] else []
    if error is not None:
        raise error
    for rank, message in enumerate(messages):
        if message is not None:
            raise UserError(f"rank {rank} failed: {message}")
