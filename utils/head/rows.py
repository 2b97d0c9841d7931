"""Storage of the class rows: weight, what their optimiser keeps for each, and what they have missed.

Legend: N local rows, S rows of the update, G samples of all ranks, D row length, T targets on this shard, K chunks.
"""

import ctypes
from collections.abc import Iterator

import numpy as np
import paddle

from utils.errors import UserError
from utils.system import advise_huge_pages, upload

BLOCK = 4096  # rows initialised from one random stream, and rows moved at a time
DEVICE_BLOCK = 1 << 16  # rows caught up at a time in a device's memory
PIECE_BYTES = 1 << 20  # rows that passes on CPU go over at a time: a few such arrays stay in a core's cache
TINY = 1e-12  # a shorter vector has no direction: similarity 0, gradient 0


class RowBank:
    """Storage of a shard: the rows, what their optimiser keeps for each, and what they have missed.

    Args:
        start: global id of the first row; rows are drawn from N(0, 0.01^2), each from its own place in the random
            streams, so that a class starts the same at any world size.
        num_rows, dim: N and D.
        optimizer: a class of ``utils.head.optimizers``.
        seed: of the initial rows.
        dtype: ``"float32"`` or ``"float64"``.
    """

    def __init__(self, start: int, num_rows: int, dim: int, optimizer, seed: int, dtype: str):
        self.optimizer, self.num_rows = optimizer, num_rows
        self.stamp_N = np.zeros(num_rows, np.int32)  # last update of a row (lazy SGD) or how many it had (AdamW)
        self.weight, *self.slots = [paddle.empty([num_rows, dim], dtype) for _ in ("weight", *optimizer.slots)]
        for tensor in self.tensors.values():
            if tensor.place.is_cpu_place():
                advise_huge_pages(tensor.data_ptr(), num_rows * dim * np.dtype(dtype).itemsize)
        for slot in self.slots:
            slot.zero_()
        for block in range(start // BLOCK, (start + num_rows - 1) // BLOCK + 1):
            rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, block])))
            rows = rng.standard_normal([BLOCK, dim], dtype=np.float32) * np.float32(0.01)
            low, high = max(block * BLOCK, start), min((block + 1) * BLOCK, start + num_rows)
            write_rows(self.weight, low - start, rows[low - block * BLOCK : high - block * BLOCK])

    @property
    def tensors(self) -> dict[str, paddle.Tensor]:
        """All tensors [N, D] by name."""
        return {"weight": self.weight, **dict(zip(self.optimizer.slots, self.slots, strict=True))}

    def missed(self, rows) -> np.ndarray | None:
        """Catch-up matrices [R, 2, 2] of these rows (slice or ids); None if there is nothing to catch up."""
        return self.optimizer.missed(self.stamp_N[rows]) if self.optimizer.lazy else None

    def caught_up(self) -> Iterator[tuple]:
        """(start, w, *slots) of all rows, range by range, as a dense optimiser would have them now; copies."""
        for start in range(0, self.num_rows, BLOCK):
            rows = slice(start, min(start + BLOCK, self.num_rows))
            chunks = [tensor[rows].numpy().copy() for tensor in self.tensors.values()]
            missed = self.missed(rows)
            yield (
                start,
                *(chunks if missed is None else self.optimizer.catch_up(*chunks, missed.astype(chunks[0].dtype))),
            )

    def rows(self, ids_R) -> np.ndarray:
        """A copy of the rows with these local ids [R, D], caught up; nothing changes."""
        ids_R = np.asarray(ids_R, np.int64)
        missed = self.missed(ids_R)
        index = paddle.to_tensor(ids_R, place=self.weight.place)
        chunks = [paddle.gather(tensor, index).numpy() for tensor in self.tensors.values()]
        return chunks[0] if missed is None else self.optimizer.catch_up(*chunks, missed.astype(chunks[0].dtype))[0]

    def caught_up_rows(self, rows, dtype) -> list[np.ndarray]:
        """[w, *slots] of these rows (slice or ids) on CPU, up to date; views of the storage if that changes nothing."""
        missed = self.missed(rows)
        copy = missed is not None and isinstance(rows, slice)
        chunks = [view(tensor)[rows].astype(dtype, copy=copy) for tensor in self.tensors.values()]
        return chunks if missed is None else list(self.optimizer.catch_up(*chunks, missed.astype(dtype)))

    def caught_up_weight(self, ids_S, start: int, stop: int, buffer_RD: np.ndarray) -> np.ndarray:
        """w of rows ``start ... stop`` of an update on CPU, up to date: in the buffer, or a view of the storage."""
        stored, dtype = view(self.weight), buffer_RD.dtype
        if ids_S is None and stored.dtype == dtype and self.missed(slice(start, stop)) is None:
            return stored[start:stop]
        for low, high in split_pieces(start, stop, buffer_RD):
            rows, w_RD = slice(low, high) if ids_S is None else ids_S[low:high], buffer_RD[low - start : high - start]
            if ids_S is not None and stored.dtype == dtype:
                np.take(stored, rows, axis=0, out=w_RD, mode="clip")  # without "clip" it goes through a copy
            else:
                w_RD[...] = stored[rows]
            missed = self.missed(rows)
            if missed is not None:
                slots = [view(tensor)[rows].astype(dtype) for tensor in self.slots]
                self.optimizer.catch_up_weight(w_RD, *slots, missed.astype(dtype))
        return buffer_RD[: stop - start]

    def catch_up(self) -> None:
        """Bring every row up to date in place."""
        if not self.optimizer.lazy or (self.stamp_N == self.optimizer.now).all():
            return
        if self.weight.place.is_cpu_place():
            for start, *chunks in self.caught_up():
                for tensor, chunk in zip(self.tensors.values(), chunks, strict=True):
                    write_rows(tensor, start, chunk)
        else:
            self._catch_up_on_device()
        self.stamp_N[:] = self.optimizer.now

    def _catch_up_on_device(self) -> None:
        """All rows, without a way through the host's memory: stamps and table alone go up."""
        stamp_N, table_A4 = upload(self.stamp_N.astype(np.int64)), upload(self.optimizer.product_A22.reshape(-1, 4))
        for start in range(0, self.num_rows, DEVICE_BLOCK):
            stop = min(start + DEVICE_BLOCK, self.num_rows)
            chunks = [tensor._slice(start, stop) for tensor in self.tensors.values()]
            fresh = catch_up_tensors(*chunks, table_A4=table_A4, stamp_R=stamp_N._slice(start, stop))
            for chunk, rows in zip(chunks, fresh, strict=True):
                chunk.copy_(rows, False)

    def stepped(self, ids_S: np.ndarray | None, lr: float) -> None:
        """Stamp the rows (None: all) that a step has just updated; flush when the table of missed steps is full.

        The table depends on the number of steps alone, never on what this rank drew: it is the same on all ranks.
        """
        rows = slice(None) if ids_S is None else ids_S
        if not self.optimizer.lazy:
            self.stamp_N[rows] += 1
            return
        self.optimizer.advance(lr)
        self.stamp_N[rows] = self.optimizer.now
        if self.optimizer.full:
            self.catch_up()
            self.optimizer.restart()
            self.stamp_N[:] = 0

    def state(self) -> dict[str, np.ndarray]:
        """Copies of everything that belongs to single rows, as stored."""
        return {**{name: tensor.numpy() for name, tensor in self.tensors.items()}, "stamp": self.stamp_N.copy()}

    def load(self, rows: dict[str, np.ndarray], table: dict[str, np.ndarray]) -> None:
        """Take back ``state`` and the optimiser's table; nothing changes if a shape or a stamp is wrong."""
        shapes = {**{name: tuple(tensor.shape) for name, tensor in self.tensors.items()}, "stamp": (self.num_rows,)}
        for name, shape in shapes.items():
            found = np.shape(rows[name]) if name in rows else "missing"
            if found != shape:
                raise UserError(f"head state: {name} is {found}, this rank needs {shape}")
        if self.optimizer.lazy:
            self.optimizer.load(table, highest_stamp=int(rows["stamp"].max()))
        for name, tensor in self.tensors.items():
            tensor.set_value(np.ascontiguousarray(rows[name], dtype_name(tensor.dtype)))
        self.stamp_N[:] = rows["stamp"]


def catch_up_tensors(w_RD, v_RD, *, table_A4, stamp_R) -> list[paddle.Tensor]:
    """(w, v) of rows with these stamps brought up to date by the transition table of each age; new tensors."""
    product_R4 = paddle.gather(table_A4, stamp_R).astype(w_RD.dtype)
    ww_R1, wv_R1, vw_R1, vv_R1 = paddle.split(product_R4, 4, axis=1)
    return [(w_RD * ww_R1).add_(v_RD * wv_R1), (v_RD * vv_R1).add_(w_RD * vw_R1)]


def split_pieces(start: int, stop: int, array_RD: np.ndarray) -> list[tuple[int, int]]:
    """``start ... stop`` cut into runs of rows of about ``PIECE_BYTES``, rows being as long as those of the array."""
    step = max(1, PIECE_BYTES // (array_RD.shape[1] * array_RD.itemsize))
    return [(low, min(low + step, stop)) for low in range(start, stop, step)]


def view(tensor: paddle.Tensor) -> np.ndarray:
    """The memory of a contiguous CPU tensor as an array, valid while the tensor lives."""
    kind = {"float32": ctypes.c_float, "float64": ctypes.c_double}[dtype_name(tensor.dtype)]
    pointer = ctypes.cast(tensor.data_ptr(), ctypes.POINTER(kind))
    return np.ctypeslib.as_array(pointer, shape=tuple(tensor.shape))


def inverse_norm(x_RD: np.ndarray) -> np.ndarray:
    """1 / |x| by row, [R, 1]; 0 where there is no direction."""
    norm_R1 = np.sqrt(np.einsum("rd,rd->r", x_RD, x_RD))[:, None]
    return (norm_R1 > TINY) / np.maximum(norm_R1, TINY, dtype=x_RD.dtype)


def write_rows(tensor: paddle.Tensor, start: int, rows: np.ndarray) -> None:
    """tensor[start : start + len(rows)] = rows, in place."""
    if tensor.place.is_cpu_place():
        view(tensor)[start : start + len(rows)] = rows
    else:
        values = paddle.to_tensor(rows).astype(tensor.dtype)
        paddle.scatter_(tensor, paddle.arange(start, start + len(rows)), values)


def dtype_name(dtype) -> str:
    """``float32`` for ``paddle.float32``, as numpy calls it."""
    return str(dtype).split(".")[-1]
