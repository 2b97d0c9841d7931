"""The training loader: worker threads decode into whole batches, Paddle takes them over without a copy.

The order is one global permutation an epoch, drawn from (seed, epoch). The global batch g holds its samples
[g*W*B, (g+1)*W*B), of which rank r takes the r-th B. What becomes of a sample (flip, augmentation) is drawn from
(seed, epoch, sample). So data do not depend on the number of threads, and an epoch resumes at any sample, at any world
size, without reading what was consumed.

On an accelerator the batch travels as uint8 NHWC and is flipped and normalised there. Where the device is the host, the
threads do it while the image is in their cache.

B local batch, W ranks, N samples, H and W (as an axis) image size.
"""

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np

from utils.data.augment import build_augment, sample_rng
from utils.data.source import SequenceSource, Source
from utils.data.threads import ThreadPipeline
from utils.decode import PIXEL_SCALE, PIXEL_SHIFT, DecodeError, decode_image, fit_image
from utils.errors import UserError

# Rows of a batch zeroed at a time before they are decoded into: a stream of zeros brings them into the cache faster
# than the decoder's scattered writes would (3 % of its time).
_ROWS_IN_CACHE = 8
_NORMALISED = np.arange(256, dtype=np.float32) * np.float32(PIXEL_SCALE) + np.float32(PIXEL_SHIFT)


def normalise_image(image: np.ndarray, out: np.ndarray, planes: np.ndarray) -> None:
    """uint8 [H, W, 3] -> float32 [3, H, W] in [-1, 1]; ``planes`` is scratch, uint8 [3, H, W]."""
    cv2.split(image, list(planes))
    cv2.LUT(planes.reshape(-1, planes.shape[-1]), _NORMALISED, dst=out.reshape(-1, out.shape[-1]))


@dataclass(frozen=True, kw_only=True)
class LoaderOptions:
    """What a loader does with its source.

    Raises:
        UserError: a value that cannot be, naming it.
    """

    rank: int = 0  # which part of every global batch is ours
    world_size: int = 1
    seed: int = 0  # base of the order, the flips and the augmentation
    num_threads: int = 2  # that decode
    augment: dict[str, dict] | None = None  # name -> parameters, see ``utils/data/augment.py``
    flip: bool = True  # mirror each image with probability one half
    image_size: int | tuple[int, int] = 112  # side, or (height, width)
    # False: another size is an error; True or "stretch"; "crop": the centre of the same proportions first; "window": a
    # random window of that size, not scaled
    resize: bool | str | None = False
    drop_last: bool = True  # the last, smaller batch is left out; else it is divided evenly, repeating a few samples
    prefetch: int = 4  # batches decoded ahead
    normalize: bool = True  # False: uint8 [B, H, W, 3] instead of float32 [B, 3, H, W] in [-1, 1]
    flip_on_host: bool | None = None  # None: on the device, unless that is the host's memory

    def __post_init__(self) -> None:
        for name in ("world_size", "num_threads", "prefetch"):
            check_count(name, getattr(self, name))
        if not 0 <= self.rank < self.world_size:
            raise UserError(f"rank: {self.rank!r} is outside 0..{self.world_size - 1}")
        if self.resize not in (False, True, None, "stretch", "crop", "window"):
            raise UserError(f"resize: {self.resize!r} is not one of False, True, 'stretch', 'crop', 'window'")
        if len(self.size) != 2 or min(self.size) < 1:
            raise UserError(f"image_size: {self.image_size!r}, a side or (height, width) was expected")

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        return (self.image_size,) * 2 if isinstance(self.image_size, int) else tuple(self.image_size)


def check_count(name: str, value: object) -> None:
    """UserError where ``value`` is no whole number from 1 on."""
    if not isinstance(value, (int, np.integer)) or value < 1:
        raise UserError(f"{name}: {value!r}, a whole number from 1 on was expected")


class SampleReader:
    """Turns (source, sample number) into pixels in a batch."""

    def __init__(self, source: Source, options: LoaderOptions) -> None:
        self.source, self.size, self.seed = source, options.size, options.seed
        self.resize = "stretch" if options.resize is True else options.resize
        self.augment = build_augment(options.augment) if options.augment else None

    def read(self, samples: np.ndarray, mirror: np.ndarray, epoch: int, images: np.ndarray, labels: np.ndarray) -> None:
        """Fill ``images`` and ``labels`` [n] int64 with the given samples.

        ``images`` is uint8 [n, H, W, 3], or float32 [n, 3, H, W] to be normalised to [-1, 1] as well.

        Raises:
            ValueError: a sample that cannot be read or has another size, naming it.
        """
        as_float = images.dtype == np.float32
        scratch = np.empty((*self.size, 3), np.uint8) if as_float else None
        planes = np.empty((3, *self.size), np.uint8) if as_float else None
        # All are fetched before the first is decoded: threads that do both in turns hold each other up (the GIL).
        fetched = self.source.fetch_many(samples)
        labels[:] = [label for _, label in fetched]
        wanted = zip(samples.tolist(), mirror.tolist(), fetched, strict=True)
        for row, (sample, flipped, (data, _)) in enumerate(wanted):
            if not as_float and row % _ROWS_IN_CACHE == 0:
                images[row : row + _ROWS_IN_CACHE].fill(0)
            image = pixels = scratch if as_float else images[row]
            self._decode(data, sample, epoch, pixels)
            if self.augment is not None:
                image = self.augment(pixels, sample_rng(self.seed, epoch, sample))
            if flipped:
                image = cv2.flip(image, 1, dst=pixels)
            if as_float:
                normalise_image(image, images[row], planes)
            elif image is not pixels:
                pixels[...] = image

    def _decode(self, data: bytes | np.ndarray, sample: int, epoch: int, out: np.ndarray) -> None:
        """Pixels of a sample into ``out`` [H, W, 3]."""
        image = data
        if not isinstance(data, np.ndarray):
            try:
                image = decode_image(data, out)
            except DecodeError as error:
                raise self.source.damaged(sample, str(error)) from error
            if image is out:
                return
        if image.shape[:2] != self.size:
            if not self.resize:
                advice = "set data.resize (stretch, crop) or pack it anew"
                reason = f"image of {_sides(image.shape)}, {_sides(self.size)} expected; {advice}"
                raise self.source.damaged(sample, reason)
            if self.resize == "window":
                image = self._window(image, sample, epoch)
            else:
                image = fit_image(image, self.size, self.resize)
        out[...] = image

    def _window(self, image: np.ndarray, sample: int, epoch: int) -> np.ndarray:
        """A random window of the network's size, not scaled, drawn from (seed, epoch, sample)."""
        spare = np.subtract(image.shape[:2], self.size)
        if spare.min() < 0:
            found = f"image of {_sides(image.shape)} is smaller than the window of {_sides(self.size)}"
            raise self.source.damaged(sample, f"{found}; set data.resize=crop")
        top, left = np.random.default_rng((self.seed, epoch, sample, 0x31D0)).integers(0, spare + 1)
        return image[top : top + self.size[0], left : left + self.size[1]]


def _sides(shape: tuple[int, ...]) -> str:
    return f"{shape[0]}x{shape[1]}"


class TrainLoader:
    """Iterates over ``(image_BCHW float32 in [-1, 1], label_B int64)``.

    Images are on Paddle's current device, labels in host memory on any device: those who need them are on the host.

    See ``build_train_loader``. ``for batch in loader`` runs the epoch (from the loaded position, after
    ``load_state_dict``); when it is over the loader stands at the next one.

    Attributes:
        last_keys: int64 [B], keys of the samples of the batch just given out.
        epoch: the epoch that is iterated next (or now).
    """

    def __init__(self, source: Source, batch_size: int, options: LoaderOptions) -> None:
        self.source, self.batch_size, self._options = source, batch_size, options
        self.rank, self.world_size, self.seed = options.rank, options.world_size, options.seed
        self._reader = SampleReader(source, options)
        self.epoch, self._position, self._pending = 0, 0, 0
        self.last_keys = np.empty(0, np.int64)
        self._pipelines: weakref.WeakSet = weakref.WeakSet()
        global_batch = batch_size * self.world_size
        whole = self.num_samples // global_batch
        self._num_batches = whole if options.drop_last else -(-self.num_samples // global_batch)
        if self._num_batches == 0:
            reason = f"{self.num_samples} samples do not fill one batch of {batch_size} on {self.world_size} rank(s)"
            most = self.num_samples // self.world_size
            advice = f"set run.batch_size={most} or lower" if most else "train on fewer ranks"
            raise UserError(f"{reason}; {advice}")

    def __len__(self) -> int:
        """Batches of a whole epoch on this rank (the same on every rank)."""
        return self._num_batches

    @property
    def num_samples(self) -> int:
        """Samples of an epoch, over all ranks."""
        return self.source.num_draws

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; a position loaded for this very epoch stays."""
        if epoch != self.epoch:
            self._pending = 0
        self.epoch, self._position = int(epoch), self._pending

    def state_dict(self) -> dict[str, int]:
        """Where the consumer stands: epoch, and samples of its global permutation given out (over all ranks)."""
        return {"epoch": self.epoch, "position": self._position, "seed": self.seed, "num_samples": self.num_samples}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where ``state_dict`` was taken, at any world size and batch size.

        Raises:
            UserError: the state is of another data set or seed.
        """
        for name, mine in (("seed", self.seed), ("num_samples", self.num_samples)):
            if state.get(name, mine) != mine:
                raise UserError(f"loader state: {name} was {state[name]}, here it is {mine}; the order would differ")
        self.epoch = int(state["epoch"])
        self._position = self._pending = int(state["position"])

    def order(self, epoch: int) -> np.ndarray:
        """The global permutation of an epoch: the source's draws, shuffled."""
        order = self.source.draws(self.seed, epoch)
        np.random.default_rng((self.seed, epoch, 0x5EED)).shuffle(order)
        return order

    def _batches(self, epoch: int, start: int) -> Iterator[tuple[np.ndarray, int]]:
        """(this rank's sample numbers, global position behind the batch), from ``start`` on."""
        order, size = self.order(epoch), self.batch_size
        step = size * self.world_size
        while start < len(order):
            stop = start + step
            if stop > len(order):
                if self._options.drop_last:
                    return
                rest = order[start:]
                size = -(-len(rest) // self.world_size)  # equal on all ranks; the last ones repeat the first samples
                block = np.resize(np.concatenate([rest, order]), size * self.world_size)
            else:
                block = order[start:stop]
            yield block[self.rank * size : (self.rank + 1) * size].astype(np.int64), min(stop, len(order))
            start = stop

    def __iter__(self) -> Iterator[tuple]:
        epoch, start = self.epoch, self._pending
        self._pending, self._position = 0, start
        pipeline = ThreadPipeline(self._reader, self.batch_size, epoch, self._options)
        self._pipelines.add(pipeline)
        keys = self.source.keys
        try:
            for samples, position, images, labels, mirror in pipeline.run(self._batches(epoch, start)):
                self._position = position
                self.last_keys = keys[samples % len(keys)]
                yield self._hand_over(images, labels, mirror)
                images = labels = None
            if self.epoch == epoch:
                self.epoch, self._position = epoch + 1, 0
        finally:
            pipeline.close()

    def _hand_over(self, images: np.ndarray, labels: np.ndarray, mirror: np.ndarray) -> tuple:
        """A batch in host memory -> tensors on the device, flipped and normalised there unless the threads did it."""
        import paddle

        from utils.compat import share_numpy
        from utils.system import upload

        label = paddle.to_tensor(labels, place=paddle.CPUPlace())
        put = share_numpy if paddle.get_device() == "cpu" else upload
        if images.dtype == np.float32:
            return put(images), label
        if self._options.flip_on_host or not self._options.flip:
            image = put(images)
        else:  # pixels and flips go up as one vector of bytes
            num_bytes = images.size
            packed = upload(np.concatenate([images.reshape(-1), mirror.astype(np.uint8)]))
            image = packed._slice(0, num_bytes).reshape(images.shape)
            # Paddle has no where or flip of uint8
            wide = image.astype("float32" if self._options.normalize else "int32")
            mirror = packed._slice(num_bytes, num_bytes + len(mirror)).astype("bool").reshape([-1, 1, 1, 1])
            image = paddle.where(mirror, wide.flip(2), wide)
        if self._options.normalize:
            image = paddle.scale(image.transpose([0, 3, 1, 2]).astype("float32"), PIXEL_SCALE, PIXEL_SHIFT)
        elif image.dtype != paddle.uint8:
            image = image.astype("uint8")
        return image, label

    def close(self) -> None:
        """End every running iteration and its threads; without it they end with their iterator."""
        for pipeline in list(self._pipelines):
            pipeline.close()


def build_train_loader(source: Source | Sequence, batch_size: int, **options) -> TrainLoader:
    """The loader of one rank.

    Args:
        source: a source, or anything with ``len`` and ``[i] -> (uint8 RGB HWC, label)``.
        batch_size: B of this rank.
        options: of ``LoaderOptions``.

    Raises:
        UserError: a value that cannot be, naming it.
    """
    check_count("batch_size", batch_size)
    chosen = LoaderOptions(**options)
    if chosen.flip_on_host is None:
        import paddle

        chosen = replace(chosen, flip_on_host=paddle.get_device() == "cpu")
    return TrainLoader(source if isinstance(source, Source) else SequenceSource(source), batch_size, chosen)
