"""Images -> embeddings, the one way for verification, IJB, tools and users.

    embedder = load_embedder("work_dirs/run")                     # a run directory, a weights file, .onnx or a layer
    embedding_ND = embedder(images)                               # uint8 RGB [N, H, W, 3] -> float32 [N, D], raw
    mirrored_ND = embedder(images, flip=True)                     # the same of the mirror images
    embedding_1D = infer("face.jpg", backbone="iresnet50", pretrained="backbone.pdparams")

Any number of images at flat memory, over several ranks, resumable: ``eval.stream.embed_to_file``.

Shapes: N images, B one batch, D embedding size, H = W the network's input size in pixels.
"""

import functools
import hashlib
import os
import sys
from pathlib import Path

import cv2
import numpy as np
import yaml

from backbones import build_backbone, resolve_name
from backbones.guess import guess_network
from eval.engines import BUILDERS, ENGINES
from utils.errors import UserError
from utils.photos.detect import Detector, build_detector
from utils.photos.faces import align_largest, read_image
from utils.photos.photo import read_photo
from utils.system import threads_of_rank
from utils.weights.onnx_walk import read_onnx, wants_raw_pixels
from utils.weights.states import TORCH, is_torch_spelling, load_state, read_state

RUN_FILES = {"last": "backbone.pdparams", "best": "backbone_best.pdparams"}
AUTO_ORDER = ("predictor", "onnx", "static", "dynamic")  # fastest on CPU first, as benchmarks/embed.py measures


class Embedder:
    """Callable: uint8 RGB images [N, H, W, 3] -> raw float32 embeddings [N, D].

    Attributes:
        engine: name of the engine that runs (``dynamic``, ``static``, ``predictor``, ``onnx``).
        input_size: H = W in pixels.
        embedding_size: D.
        batch_size: largest batch handed to the engine.
        in_channels: 3, or 1 for ``.onnx`` files of grey images (which get the luma of the RGB given here).
        raw_pixels: the network scales pixels by itself (old ONNX files) and is given 0 ... 255, not [-1, 1].
    """

    def __init__(self, engine, input_size: int, embedding_size: int, batch_size: int = 64, in_channels: int = 3,
                 raw_pixels: bool = False, source=None):  # fmt: skip
        self._engine = engine
        self.engine = engine.name
        self.input_size = input_size
        self.embedding_size = embedding_size
        self.batch_size = batch_size
        self.in_channels = in_channels
        self.raw_pixels = raw_pixels
        self._source = source

    @property
    def identity(self) -> str:
        """A digest of the weights: what tells whether embeddings on disk are this model's."""
        state = hashlib.blake2b(digest_size=12)
        if isinstance(self._source, str | os.PathLike):
            with open(self._source, "rb") as file:
                while block := file.read(1 << 24):
                    state.update(block)
        else:
            for name, tensor in self._source.state_dict().items():
                state.update(name.encode() + tensor.numpy().tobytes())
        return state.hexdigest()

    def __call__(self, images_NHWC: np.ndarray, flip: bool = False) -> np.ndarray:
        """Embed ``images_NHWC``, or their mirror images with ``flip``; not normalised, any N from 0.

        Raises:
            ValueError: not uint8 [N, input_size, input_size, 3].
        """
        images_NHWC = np.asarray(images_NHWC)
        size = self.input_size
        if images_NHWC.dtype != np.uint8 or images_NHWC.ndim != 4 or images_NHWC.shape[1:] != (size, size, 3):
            raise ValueError(
                f"images: {images_NHWC.dtype} {list(images_NHWC.shape)}; expected uint8 [N, {size}, {size}, 3] RGB"
            )
        result_ND = np.empty((len(images_NHWC), self.embedding_size), np.float32)
        for start in range(0, len(images_NHWC), self.batch_size):
            batch = images_NHWC[start : start + self.batch_size]
            result_ND[start : start + len(batch)] = self._engine.run(self._prepare(batch, flip))
        return result_ND

    def _prepare(self, images_BHWC: np.ndarray, flip: bool) -> np.ndarray:
        if flip:
            images_BHWC = images_BHWC[:, :, ::-1]
        if self.in_channels == 1:
            images_BHWC = np.stack([cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None] for image in images_BHWC])
        image_BCHW = np.ascontiguousarray(images_BHWC.transpose(0, 3, 1, 2), np.float32)
        if not self.raw_pixels:
            image_BCHW /= 127.5
            image_BCHW -= 1.0
        return image_BCHW


def load_embedder(model, network: str | None = None, engine: str = "auto", batch_size: int = 64, *,
                  which: str = "last", num_threads: int | None = None) -> Embedder:  # fmt: skip
    """An ``Embedder`` for a trained model.

    Args:
        model: a run directory, a weights file (``.pdparams``, ``.safetensors``, ``.pt``), an ``.onnx`` file or a
            Paddle layer. A layer runs ``dynamic`` unless an engine is named, and keeps its train/eval mode. An
            ``.onnx`` file runs in onnxruntime; for another engine its weights are taken out of it.
        network: name of the backbone; None: told by ``config.yaml`` beside the weights, else by their names and shapes.
        engine: ``auto`` (the fastest that works here; what does not is named on stderr) or one of ``ENGINES``.
        batch_size: largest batch.
        which: weights of a run directory: ``last`` or ``best``.
        num_threads: CPU threads; None: all this process may use, shared with the other ranks of the machine.

    Raises:
        UserError: nothing usable at ``model``; weights that do not fit; an engine that cannot run.
    """
    if engine not in ("auto", *ENGINES):
        raise UserError(f"engine {engine!r}: choose auto, {', '.join(ENGINES)}")
    if batch_size < 1:
        raise UserError(f"batch_size {batch_size}: must be at least 1")
    if isinstance(model, str | os.PathLike) and str(model).endswith(".onnx") and engine in ("auto", "onnx"):
        running = _first_that_works(("onnx",), _existing(model), num_threads or threads_of_rank())
        raw_pixels = wants_raw_pixels(model)
        return Embedder(
            running, running.input_size, running.embedding_size, batch_size, running.in_channels, raw_pixels, model
        )
    is_layer = not isinstance(model, str | os.PathLike)
    if is_layer:
        layer, order = model, ("dynamic",) if engine == "auto" else (engine,)
    else:
        num_threads = num_threads or threads_of_rank()
        layer, order = load_backbone(model, network, which), AUTO_ORDER if engine == "auto" else (engine,)
    running = _first_that_works(order, layer, num_threads)
    return Embedder(running, layer.input_size, layer.embedding_size, batch_size, source=layer)


def load_backbone(model: str | Path, network: str | None = None, which: str = "last"):
    """The backbone at ``model`` (run directory or weights file) with its weights, in evaluation mode."""
    path = Path(model)
    if path.is_dir():
        if which not in RUN_FILES:
            raise UserError(f"which {which!r}: choose {' or '.join(RUN_FILES)}")
        path = path / RUN_FILES[which]
    if _existing(path).suffix == ".onnx":
        state, from_torch = read_onnx(path), True
    else:
        state = read_state(path)
        from_torch = is_torch_spelling(state) or path.suffix in TORCH
    told = model_options(path.parent) or guess_network(state, from_torch)
    options = chosen_options(told, network, path)
    layer = build_backbone(options.pop("network"), **options)
    load_state(layer, state, path, from_torch)
    layer.eval()
    return layer


def chosen_options(told: dict | None, network: str | None, source: str | Path) -> dict:
    """``network`` and options to build: what the files tell, unless another network is named.

    Args:
        told: network and options from a config.yaml or from the weights themselves, None if nothing does.
        network: the user's choice, None to believe the files.
        source: the file meant, for messages.
    """
    if network is None:
        if told is None:
            raise UserError(f"{source}: no config.yaml beside it, and its tensors tell no known network; "
                            "name it, for example --network iresnet50")  # fmt: skip
        return dict(told)
    try:
        same = told is not None and resolve_name(told["network"]) == resolve_name(network)
    except ValueError as error:
        raise UserError(f"network {network!r}: {error}") from None
    return dict(told) if same else {"network": network}


def _existing(path: str | Path) -> Path:
    if not Path(path).is_file():
        raise UserError(f"{path}: no such weights file")
    return Path(path)


def model_options(run: Path) -> dict | None:
    """The ``model:`` section of ``run/config.yaml`` (network and options of build_backbone), None without the file."""
    path = Path(run) / "config.yaml"
    if not path.is_file():
        return None
    with open(path) as file:
        section = (yaml.safe_load(file) or {}).get("model")
    if not isinstance(section, dict) or "network" not in section:
        raise UserError(f"{path}: no model.network in it; is this the config.yaml of a run?")
    return {key: value for key, value in section.items() if value is not None}


def infer(image, backbone: str = "iresnet50", pretrained: str | Path = "", num_features: int | None = None,
          flip: bool = False, engine: str = "auto", detector: str | Path | None = None) -> np.ndarray:  # fmt: skip
    """Embed one face, or a batch of them; the model and the detector are kept for the next call.

    Args:
        image: a path, uint8 RGB [H, W, 3] or [N, H, W, 3]: aligned and of the network's input size, or with a
            ``detector`` photos of any size, whose largest face is aligned.
        backbone: name of the network.
        pretrained: weights file or run directory.
        num_features: D, only checked.
        flip: add the embedding of the mirror image.
        engine: as in ``load_embedder``.
        detector: ``mtcnn`` or a YuNet file (``utils.photos.detect``); None: faces are aligned already.

    Returns:
        float32 [1, D] or [N, D], not normalised.

    Raises:
        UserError: a file that is no image, no face in a photo, weights that cannot be used.
    """
    if not str(pretrained):
        raise UserError("infer: name the weights: pretrained='backbone.pdparams'")
    path = Path(pretrained)
    stamp = (path / RUN_FILES["last"] if path.is_dir() else path).stat().st_mtime_ns if path.exists() else 0
    embedder = _cached_embedder(str(pretrained), backbone, engine, stamp)
    if num_features is not None and num_features != embedder.embedding_size:
        raise UserError(f"infer: num_features={num_features}, but {pretrained} gives {embedder.embedding_size}")
    from_file = isinstance(image, str | os.PathLike)
    if from_file:
        images = read_image(image) if detector is None else read_photo(image)
    else:
        images = np.asarray(image)
    images = images[None] if images.ndim == 3 else images
    if detector is not None:
        detect, size = _cached_detector(str(detector)), embedder.input_size
        names = [str(image)] if from_file else [f"image {index}" for index in range(len(images))]
        images = np.stack([align_largest(photo, detect, size, name) for photo, name in zip(images, names, strict=True)])
    return embedder(images) + embedder(images, flip=True) if flip else embedder(images)


@functools.lru_cache(maxsize=1)
def _cached_detector(name: str) -> Detector:
    return build_detector(name)


@functools.lru_cache(maxsize=1)
def _cached_embedder(pretrained: str, backbone: str, engine: str, stamp: int) -> Embedder:
    return load_embedder(pretrained, backbone, engine)


def _first_that_works(order: tuple[str, ...], layer, num_threads: int | None):
    for position, name in enumerate(order):
        try:
            return BUILDERS[name](layer, num_threads)
        except Exception as error:
            # An engine may lack its package or refuse the machine in many ways; the reason is told, then the next.
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            if position + 1 == len(order):
                raise UserError(f"engine {name!r} cannot run here: {reason}") from error
            print(f"engine {name} cannot run here ({reason}); trying {order[position + 1]}", file=sys.stderr)
    raise UserError("no engine named")
