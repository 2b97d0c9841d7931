"""Which engine runs a model: the one named, or the fastest that works here.

On the CPU that is OpenVINO where it is installed, else Paddle's predictor. On processors that are not Intel's nobody
knows beforehand: the engines run the network for two seconds in all, and the result is kept beside the weights.
"""

import contextlib
import functools
import importlib.util
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
import paddle

from eval.engines import DynamicEngine, OnnxEngine, PredictorEngine, StaticEngine, save_onnx
from eval.kept import converted_key, keep_speeds, kept_onnx, read_speeds, weights_key
from eval.network_input import read_onnx_input
from eval.openvino_engine import OpenvinoEngine, emulates_bfloat16
from utils import distributed
from utils.errors import UserError
from utils.system import processor

BUILDERS = {
    "openvino": OpenvinoEngine,
    "predictor": PredictorEngine,
    "onnx": OnnxEngine,
    "static": StaticEngine,
    "dynamic": DynamicEngine,
}
ENGINES = tuple(BUILDERS)
PACKAGES = {"openvino": "openvino", "onnx": "onnxruntime"}  # what paddle does not bring
MEASURED = (*PACKAGES, "predictor")
MEASURED_SECONDS = 2.0  # all engines together
MEASURED_IMAGES = 16


class Source:
    """A model to run: a layer, or a weights file whose layer is loaded only if an engine needs it."""

    def __init__(self, model, load: Callable[[], object] | None = None, options: object = None):
        """``model``: a layer or the path of a file; ``load`` and ``options``: makes its layer, and what decides how."""
        self.path = model if isinstance(model, Path) else None
        self.is_onnx = self.path is not None and self.path.suffix.lower() == ".onnx"
        self._load, self._options = load or (lambda: model), options
        self.failure: Exception | None = None  # why there is no layer: no engine can help

    @functools.cached_property
    def layer(self):
        """The Paddle layer."""
        try:
            return self._load()
        except Exception as error:
            self.failure = error
            raise

    @functools.cached_property
    def weights(self) -> str:
        """A digest of the file and of what else decides the network."""
        return weights_key(self.path, self._options)

    @functools.cached_property
    def key(self) -> str:
        """``weights``, and the code that converts them."""
        return converted_key(self.weights)

    @contextlib.contextmanager
    def onnx_file(self) -> Iterator[tuple[Path, bool]]:
        """(an ``.onnx`` file of the network, whether it was made from other weights)."""
        if self.is_onnx:
            yield self.path, False
            return

        def make(path: Path) -> None:
            save_onnx(self.layer, path)

        with kept_onnx(self.path, self.key, make, say) as path:
            yield path, True


def say(text: str) -> None:
    """A line about engines on stderr, from rank 0."""
    if distributed.get_rank() == 0:
        print(text, file=sys.stderr, flush=True)


def start_engine(
    source: Source,
    engine: str,
    num_threads: int | None,
    cpu_order: tuple[str, ...] = ENGINES,
    reduced: bool = False,
):
    """The engine named, or for ``auto`` the fastest; what is tried and does not work is said.

    Args:
        source: what to run.
        engine: ``auto`` or one of ``ENGINES``.
        num_threads: CPU threads.
        cpu_order: what ``auto`` tries on the CPU, the fastest first.
        reduced: whether bfloat16 may be used: OpenVINO, which alone has it, then goes before what is faster in float32.
    """
    if engine not in ("auto", *ENGINES):
        raise UserError(f"engine {engine!r}: choose auto, {', '.join(ENGINES)}")
    if engine != "auto":
        return _first_that_works((engine,), source, num_threads)
    if source.path is None:
        return _first_that_works(("dynamic",), source, num_threads)  # its weights may change, and its device is its own
    if source.is_onnx:
        read_onnx_input(source.path)  # what no engine can run ends here, in one line
    order = auto_order(source.is_onnx, cpu_order)
    known = [name for name in order if _installed(name)]
    unsure = paddle.get_device() == "cpu" and not processor()[0].startswith("GenuineIntel")
    if unsure and not (reduced and "openvino" in known and not emulates_bfloat16()):
        known = _by_speed(known, source, num_threads)
    running = _first_that_works(tuple(known), source, num_threads)
    missing = [name for name in order[: order.index(running.name)] if name not in known]
    hint = f"; {', '.join(missing)} would come first, but is not installed" if missing else ""
    say(f"engine {running.name}: {describe(running.name)}, {num_threads} threads{hint}")
    return running


def auto_order(is_onnx: bool, cpu_order: tuple[str, ...] = ENGINES) -> tuple[str, ...]:
    """Engines from the fastest on, for Paddle's current device and the kind of file."""
    device = paddle.get_device().partition(":")[0]
    if device == "cpu":
        return ("openvino", "onnx") if is_onnx else cpu_order
    if device == "gpu":
        return ("onnx", "static", "dynamic") if is_onnx else ("predictor", "static", "dynamic")
    return "static", "dynamic"


def describe(name: str) -> str:
    """Package and version behind an engine, and the device."""
    if name in PACKAGES:
        return f"{PACKAGES[name]} {version(PACKAGES[name])} on {paddle.get_device()}"
    return f"paddle {paddle.__version__} on {paddle.get_device()}"


def _by_speed(names: list[str], source: Source, num_threads: int | None) -> list[str]:
    """``names`` with those that are measured (or were, here, before) in front, the fastest first."""
    names_measured = [name for name in names if name in MEASURED]
    if len(names_measured) < 2:
        return names
    versions = ", ".join(describe(name) for name in names_measured)
    machine = f"{processor()[0]}, {num_threads} threads, {versions}"
    speeds = read_speeds(source.path, source.key, machine)
    if speeds is None:
        speeds = {}
        for name in names_measured:
            try:
                speeds[name] = _images_s(_build(name, source, num_threads), MEASURED_SECONDS / len(names_measured))
            except Exception as error:  # as in _first_that_works, which says it again if it comes to that
                say(f"engine {name} cannot run here ({_reason(error)})")
        if not speeds:
            return names
        keep_speeds(source.path, source.key, machine, speeds)
    shown = ", ".join(f"{name} {speed:.0f}" for name, speed in speeds.items())
    say(f"measured on {processor()[0]}: {shown} images/s")
    fastest = sorted(speeds, key=speeds.get, reverse=True)
    return [*fastest, *(name for name in names if name not in speeds)]


def _images_s(engine, seconds: float) -> float:
    size = engine.network_input.size
    images = np.random.default_rng(0).integers(0, 256, (MEASURED_IMAGES, size, size, 3), dtype=np.uint8)
    engine.embed(images[:1])
    start, num_images = time.perf_counter(), 0
    while (passed := time.perf_counter() - start) < seconds or num_images == 0:
        engine.embed(images)
        num_images += MEASURED_IMAGES
    return num_images / passed


def _first_that_works(order: tuple[str, ...], source: Source, num_threads: int | None):
    for position, name in enumerate(order):
        try:
            return _build(name, source, num_threads)
        except Exception as error:
            # An engine may lack its package or refuse the machine in many ways; the reason is told, then the next.
            if error is source.failure:
                raise
            if position + 1 == len(order):
                if isinstance(error, UserError):
                    raise
                raise UserError(f"engine {name!r} cannot run here: {_reason(error)}") from error
            say(f"engine {name} cannot run here ({_reason(error)}); trying {order[position + 1]}")
    raise UserError("no engine named")


def _installed(name: str) -> bool:
    return name not in PACKAGES or importlib.util.find_spec(PACKAGES[name]) is not None


def _reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _build(name: str, source: Source, num_threads: int | None):
    if name not in PACKAGES:
        return BUILDERS[name](source.layer, num_threads)
    if not _installed(name):
        raise UserError(f"engine {name!r} needs the package {PACKAGES[name]}: pip install {PACKAGES[name]}")
    if source.path is None:
        return BUILDERS[name](source.layer, num_threads)
    for again in (False, True):
        with source.onnx_file() as (path, made):
            try:
                return BUILDERS[name](path, num_threads)
            except UserError:
                if again or not made:
                    raise
                path.unlink(missing_ok=True)  # damaged, or removed by a process with other weights: made anew
    raise AssertionError
