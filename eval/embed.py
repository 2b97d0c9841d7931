"""Images -> embeddings, the one way for verification, IJB, tools and users.

    embedder = load_embedder("work_dirs/run")                     # a run directory, a weights file, .onnx or a layer
    embedding_ND = embedder(images)                               # uint8 RGB [N, H, W, 3] -> float32 [N, D], raw
    mirrored_ND = embedder(images, flip=True)                     # the same of the mirror images
    embedding_1D = infer("face.jpg", backbone="iresnet50", pretrained="backbone.pdparams")

Any number of images at flat memory, over several ranks, resumable: ``eval.stream.embed_to_file``.

Shapes: N images, B one batch, D embedding size, H = W the network's input size in pixels.
"""

import contextlib
import functools
import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import yaml

from backbones import build_backbone, resolve_name
from backbones.guess import guess_network
from eval.choose_engine import BUILDERS, ENGINES, Source, say, start_engine
from utils.errors import UserError
from utils.files import file_stamps
from utils.photos.detect import Detector, build_detector
from utils.photos.faces import align_largest, read_image
from utils.photos.photo import read_photo
from utils.system import threads_of_rank
from utils.text import read_text
from utils.weights.onnx_walk import read_onnx
from utils.weights.states import is_torch_file, is_torch_spelling, load_state, read_state

__all__ = ["BUILDERS", "ENGINES", "PRECISIONS", "RUN_FILES", "Embedder", "infer", "load_backbone", "load_embedder"]

RUN_FILES = {"last": "backbone.pdparams", "best": "backbone_best.pdparams"}
AUTO_ORDER = ENGINES  # fastest on Intel's CPUs first, as benchmarks/embed.py measures
PRECISIONS = ("fp32", "bf16", "auto")
LEAST_COSINE = 0.9995  # of a bfloat16 embedding to the float32 one, for every image
CHECKED_IMAGES = 64


class Embedder:
    """Callable: uint8 RGB images [N, H, W, 3] -> raw float32 embeddings [N, D].

    Attributes:
        engine: name of the engine that runs, one of ``ENGINES``.
        precision: ``fp32`` or ``bf16``; ``auto`` until enough images have been seen to decide.
        input_size: H = W in pixels.
        embedding_size: D.
        batch_size: largest batch handed to the engine.
    """

    def __init__(self, engine, source: Source, batch_size: int = 64, precision: str = "fp32"):
        self._engine, self._source = engine, source
        self.engine = engine.name
        self.input_size, self.embedding_size = engine.network_input.size, engine.embedding_size
        self.batch_size = batch_size
        self.precision = precision
        self._worst, self._num_checked = 1.0, 0  # of the check of bfloat16; its figure is said for ``bf16`` too
        self._checking = precision != "fp32"
        if self._checking:
            why = self._no_bfloat16()
            if why and precision == "bf16":
                raise UserError(f"--precision bf16: {why}; use --precision fp32")
            if why:
                say(f"precision fp32: {why}")
                self.precision, self._checking = "fp32", False
            elif precision == "bf16":
                engine.precision = "bf16"

    @property
    def identity(self) -> str:
        """A digest of the weights and precision: what tells whether embeddings on disk are this model's."""
        if self._source.path is not None:
            weights = self._source.weights
        else:
            state = hashlib.blake2b(digest_size=12)
            for name, tensor in self._source.layer.state_dict().items():
                state.update(name.encode() + tensor.numpy().tobytes())
            weights = state.hexdigest()
        return weights if self.precision == "fp32" else f"{weights}-{self.precision}"

    @contextlib.contextmanager
    def onnx_file(self) -> Iterator[Path]:
        """The network as an ``.onnx`` file: the model's own, or the one kept beside its weights."""
        with self._source.onnx_file() as (path, _):
            yield path

    def stay(self) -> None:
        """Keep to the precision that all embeddings so far have: float32 where too few images were seen to decide."""
        if self._checking and self.precision == "auto":
            self.precision, self._checking = "fp32", False
            seen = f"{self._num_checked} images are too few to check bfloat16 on"
            say(f"precision fp32: {seen} ({CHECKED_IMAGES} wanted)")

    def __call__(self, images_NHWC: np.ndarray, flip: bool = False) -> np.ndarray:
        """Embed ``images_NHWC``, or their mirror images with ``flip``; not normalised, any N from 0.

        Raises:
            ValueError: not uint8 [N, input_size, input_size, 3].
        """
        return self.start(images_NHWC, "mirror" if flip else "plain").result()

    def start(self, images_NHWC: np.ndarray, view: str = "plain"):
        """Begin to embed; the ``result()`` of what is returned waits for the embeddings.

        OpenVINO works on while the caller reads the next images, which must not be written over these; other engines
        are done when this returns.

        Args:
            images_NHWC: uint8 RGB.
            view: ``plain`` or ``mirror`` for [N, D]; ``both`` for [N, 2, D].

        Raises:
            ValueError: as in a call.
        """
        images_NHWC = np.asarray(images_NHWC)
        size = self.input_size
        if images_NHWC.dtype != np.uint8 or images_NHWC.ndim != 4 or images_NHWC.shape[1:] != (size, size, 3):
            raise ValueError(
                f"images: {images_NHWC.dtype} {list(images_NHWC.shape)}; expected uint8 [N, {size}, {size}, 3] RGB"
            )
        if self._checking and len(images_NHWC):
            self.settle(images_NHWC)
        if self.engine == "openvino":
            return self._engine.start(images_NHWC, view, self.batch_size)
        views = {"plain": (1,), "mirror": (-1,), "both": (1, -1)}[view]
        done = Future()
        embeddings = [self._batches(images_NHWC[:, :, ::step]) for step in views]
        done.set_result(np.stack(embeddings, axis=1) if view == "both" else embeddings[0])
        return done

    def _batches(self, images_NHWC: np.ndarray) -> np.ndarray:
        result_ND = np.empty((len(images_NHWC), self.embedding_size), np.float32)
        for start in range(0, len(images_NHWC), self.batch_size):
            batch = images_NHWC[start : start + self.batch_size]
            result_ND[start : start + len(batch)] = self._engine.embed(batch)
        return result_ND

    @property
    def undecided(self) -> bool:
        """Whether ``settle`` still has something to do."""
        return self._checking

    def settle(self, images_NHWC: np.ndarray, agree: Callable[[bool], bool] = bool) -> None:
        """Compare bfloat16 with float32 on real faces and, for ``auto``, choose by it; the figure is said.

        Fewer images than ``CHECKED_IMAGES`` decide nothing unless bfloat16 fails on one: float32 goes on until enough
        have been seen.

        Args:
            images_NHWC: uint8 RGB faces; the first of them are used.
            agree: given whether bfloat16 fails here, tells whether it fails on any rank.
        """
        some = images_NHWC[: CHECKED_IMAGES - self._num_checked]
        embeddings = []
        for precision in ("fp32", "bf16"):
            self._engine.precision = precision
            embeddings.append(self._engine.start(some, "both", self.batch_size).result().astype(np.float64))
        full, reduced = embeddings
        norms = np.linalg.norm(full, axis=2) * np.linalg.norm(reduced, axis=2)
        cosine = (full * reduced).sum(2) / np.maximum(norms, np.finfo(np.float64).tiny)
        self._worst = min(self._worst, float(cosine.min()))
        self._num_checked += len(some)
        fails = agree(not self._worst >= LEAST_COSINE)  # also where it is NaN
        enough = self._num_checked >= CHECKED_IMAGES
        if self.precision == "auto":
            if fails or enough:
                self.precision = "fp32" if fails else "bf16"
            self._engine.precision = "bf16" if self.precision == "bf16" else "fp32"
        if fails or enough:
            self._checking = False
            found = f"least cosine of bfloat16 to float32 {self._worst:.6f} on {self._num_checked} images"
            say(f"precision {self.precision}: {found} and their mirror images, at least {LEAST_COSINE} wanted")

    def _no_bfloat16(self) -> str | None:
        if self.engine != "openvino":
            return f"engine {self.engine} computes in float32 alone"
        return None if self._engine.has_bfloat16 else "this processor does not compute in bfloat16"


def precision_of(identity: str) -> str:
    """The precision that an ``Embedder.identity`` tells."""
    return next((name for name in PRECISIONS if identity.endswith(f"-{name}")), "fp32")


def start(embedder, images_NHWC: np.ndarray, view: str):
    """``embedder.start``, also for any other callable that takes images and ``flip``."""
    if isinstance(embedder, Embedder):
        return embedder.start(images_NHWC, view)
    done = Future()
    if view == "both":
        done.set_result(np.stack([embedder(images_NHWC), embedder(images_NHWC, flip=True)], axis=1))
    else:
        done.set_result(embedder(images_NHWC, flip=True) if view == "mirror" else embedder(images_NHWC))
    return done


def load_embedder(
    model,
    network: str | None = None,
    engine: str = "auto",
    batch_size: int = 64,
    *,
    which: str = "last",
    num_threads: int | None = None,
    precision: str = "fp32",
) -> Embedder:
    """An ``Embedder`` for a trained model.

    Args:
        model: a run directory, a weights file (``.pdparams``, ``.safetensors``, ``.pt``), an ``.onnx`` file or a
            Paddle layer. A layer runs ``dynamic`` unless an engine is named, and keeps its train/eval mode. An
            ``.onnx`` file runs in OpenVINO or onnxruntime; for another engine its weights are taken out of it.
        network: name of the backbone; None: told by ``config.yaml`` beside the weights, else by their names and shapes.
        engine: ``auto`` (the fastest that works here; it is named on stderr, and so is what does not work) or one of
            ``ENGINES``.
        batch_size: largest batch.
        which: weights of a run directory: ``last`` or ``best``.
        num_threads: CPU threads; None: all this process may use, shared with the other ranks of the machine.
        precision: ``fp32``; ``bf16`` where the processor computes in it (OpenVINO alone); ``auto``: bf16 if, on the
            first ``CHECKED_IMAGES`` images, every embedding's cosine to the float32 one is at least ``LEAST_COSINE``.

    Raises:
        UserError: nothing usable at ``model``; weights that do not fit; an engine or a precision that cannot run.
    """
    if engine not in ("auto", *ENGINES):
        raise UserError(f"engine {engine!r}: choose auto, {', '.join(ENGINES)}")
    if precision not in PRECISIONS:
        raise UserError(f"precision {precision!r}: choose {', '.join(PRECISIONS)}")
    if batch_size < 1:
        raise UserError(f"--batch-size {batch_size}: must be at least 1")
    if isinstance(model, str | os.PathLike):
        num_threads = num_threads or threads_of_rank()
        path = weights_path(model, which)
        options = {"network": network, "config": model_options(path.parent)}
        source = Source(path, lambda: load_backbone(path, network), options)
    else:
        source = Source(model)
    running = start_engine(source, engine, num_threads, AUTO_ORDER, reduced=precision != "fp32")
    return Embedder(running, source, batch_size, precision)


def weights_path(model: str | Path, which: str = "last") -> Path:
    """The weights file that a run directory or a file stands for.

    Raises:
        UserError: there is none.
    """
    path = Path(model)
    if path.is_dir():
        if which not in RUN_FILES:
            raise UserError(f"which {which!r}: choose {' or '.join(RUN_FILES)}")
        path = path / RUN_FILES[which]
    if not path.is_file():
        raise UserError(f"{path}: no such weights file")
    return path


def load_backbone(model: str | Path, network: str | None = None, which: str = "last"):
    """The backbone at ``model`` (run directory or weights file) with its weights, in evaluation mode."""
    path = weights_path(model, which)
    if path.suffix == ".onnx":
        state, from_torch = read_onnx(path), True
    else:
        state = read_state(path)
        from_torch = is_torch_spelling(state) or is_torch_file(path)
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
            problem = "no config.yaml beside it, and its tensors tell no known network"
            raise UserError(f"{source}: {problem}; name it, for example --network iresnet50")
        return dict(told)
    try:
        same = told is not None and resolve_name(told["network"]) == resolve_name(network)
    except ValueError as error:
        raise UserError(f"network {network!r}: {error}") from None
    return dict(told) if same else {"network": network}


def model_options(run: Path) -> dict | None:
    """The ``model:`` section of ``run/config.yaml`` (network and options of build_backbone), None without the file."""
    sections = run_settings(run, "model")
    if sections is None:
        return None
    if "network" not in sections[0]:
        raise UserError(f"{Path(run) / 'config.yaml'}: no model.network in it; is this the config.yaml of a run?")
    return {key: value for key, value in sections[0].items() if value is not None}


def run_settings(run: Path, *names: str) -> list[dict] | None:
    """These sections of ``run/config.yaml``, empty where they are not in it; None without the file.

    Raises:
        UserError: the file is no YAML, or no mapping of sections.
    """
    path = Path(run) / "config.yaml"
    if not path.is_file():
        return None
    try:
        tree = yaml.safe_load(read_text(path)) or {}
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{path}: no valid YAML: {error}") from None
    sections = [tree.get(name) or {} for name in names] if isinstance(tree, dict) else [tree]
    wrong = next((section for section in sections if not isinstance(section, dict)), None)
    if wrong is not None:
        raise UserError(f"{path}: {str(wrong)[:60]!r} where settings were expected; is this the config.yaml of a run?")
    return sections


def infer(
    image,
    backbone: str = "iresnet50",
    pretrained: str | Path = "",
    num_features: int | None = None,
    flip: bool = False,
    engine: str = "auto",
    detector: str | Path | None = None,
    precision: str = "fp32",
) -> np.ndarray:
    """Embed one face, or a batch of them; the model and the detector are kept for the next call.

    Args:
        image: a path, uint8 RGB [H, W, 3] or [N, H, W, 3]: aligned and of the network's input size, or with a
            ``detector`` photos of any size, whose largest face is aligned.
        backbone: name of the network.
        pretrained: weights file or run directory.
        num_features: D, only checked.
        flip: add the embedding of the mirror image.
        engine, precision: as in ``load_embedder``; ``auto`` decides over the calls with the same model.
        detector: ``mtcnn`` or a YuNet file (``utils.photos.detect``); None: faces are aligned already.

    Returns:
        float32 [1, D] or [N, D], not normalised.

    Raises:
        UserError: a file that is no image, no face in a photo, weights that cannot be used.
    """
    if not str(pretrained):
        raise UserError("infer: name the weights: pretrained='backbone.pdparams'")
    path = Path(pretrained)
    weights = path / RUN_FILES["last"] if path.is_dir() else path
    stamps = file_stamps(weights.parent, [weights.name, "config.yaml"])  # what the model kept was made from
    embedder = _cached_embedder(str(path.resolve()), backbone, engine, precision, tuple(stamps))
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
def _cached_embedder(pretrained: str, backbone: str, engine: str, precision: str, stamps: tuple) -> Embedder:
    return load_embedder(pretrained, backbone, engine, precision=precision)
