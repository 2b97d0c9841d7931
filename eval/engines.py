"""Engines: ways to run one backbone. Each maps float32 [B, 3, H, W] in [-1, 1] to float32 [B, D] in ``run``.

``dynamic`` runs the layer as it is; ``static`` compiles it (``paddle.jit.to_static``, oneDNN on CPU) and shares its
weights; ``predictor`` (``paddle.inference``, oneDNN on CPU) and ``onnx`` (onnxruntime) work on a copy of the weights.
``eval.openvino_engine`` has one more. All run on Paddle's current device, or refuse it.
"""

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import paddle
from paddle.base import core

from eval.network_input import NetworkInput, embedding_output, embedding_rows, read_onnx_input
from utils.compat import paddle_version
from utils.errors import UserError
from utils.model.modes import evaluating
from utils.system import keep_freed_memory

OPSET = 15  # the lowest that covers what the backbones use, so that old runtimes read the files


class DynamicEngine:
    """The layer itself, in evaluation mode, without gradients; the layer's own mode is restored after each call."""

    name = "dynamic"

    def __init__(self, layer, num_threads: int | None = None):
        self.layer = layer
        self.num_threads = num_threads

    @property
    def network_input(self) -> NetworkInput:
        """Of the layer."""
        return NetworkInput(self.layer.input_size)

    @property
    def embedding_size(self) -> int:
        """D of the layer."""
        return self.layer.embedding_size

    def embed(self, image_BHWC: np.ndarray) -> np.ndarray:
        """uint8 RGB [B, H, W, 3] -> [B, D]."""
        return self.run(self.network_input.prepare(image_BHWC))

    def run(self, image_BCHW: np.ndarray) -> np.ndarray:
        """[B, 3, H, W] -> [B, D]."""
        if self.num_threads:
            core.set_num_threads(self.num_threads)
        with evaluating(self.layer):
            return self._forward(paddle.to_tensor(image_BCHW)).astype("float32").numpy()

    def _forward(self, image):
        return self.layer(image)


class _CopyOut(paddle.nn.Layer):
    """``layer`` and a copy of its result.

    Under oneDNN Paddle 3 replaces the operations it takes in place and keeps pointers to the outputs of those that
    were there: a program that ends in one (a batch norm, say) reads freed memory and crashes now and then. It never
    takes a copy.
    """

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, image):
        return paddle.assign(self.layer(image))


class StaticEngine(DynamicEngine):
    """The layer compiled once; its weights are shared, so later training is seen."""

    name = "static"

    def __init__(self, layer, num_threads: int | None = None):
        super().__init__(layer, num_threads)
        # Kept, because what is compiled holds it weakly. Paddle 2.6 needs no copy, and would rewrite the inner forward.
        self._whole = layer
        if paddle_version() >= (3, 0):
            self._whole = _CopyOut(layer)
            self._whole.training = False
        with evaluating(layer):
            self._compiled = paddle.jit.to_static(self._whole.forward, input_spec=[image_spec(layer)], full_graph=True)
        self._on_cpu = paddle.get_device() == "cpu"

    def _forward(self, image):
        if not self._on_cpu:
            return self._compiled(image)
        before = paddle.get_flags(["FLAGS_use_mkldnn"])
        paddle.set_flags({"FLAGS_use_mkldnn": True})
        try:
            return self._compiled(image)
        finally:
            paddle.set_flags(before)


class PredictorEngine:
    """Paddle Inference on an exported model (a layer is exported to a temporary folder first); CPU and GPU."""

    name = "predictor"

    def __init__(self, model, num_threads: int | None = None):
        import paddle.inference as inference

        device = check_device(self.name, "cpu", "gpu")
        is_file = isinstance(model, str | Path)
        self.network_input = NetworkInput() if is_file else NetworkInput(model.input_size)
        self.embedding_size = None if is_file else model.embedding_size
        with tempfile.TemporaryDirectory() as folder:
            prefix = model if is_file else save_inference_model(model, Path(folder) / "model")
            program, weights = inference_files(prefix)
            config = inference.Config(str(program), str(weights))
            config.disable_glog_info()
            if device == "cpu":
                keep_freed_memory()  # for the whole process: fresh pages for every layer's output cost 7 % of the time
                config.disable_gpu()
                config.enable_mkldnn()
                config.set_mkldnn_cache_capacity(8)  # one entry a batch size: bounded memory
                config.set_cpu_math_library_num_threads(num_threads or 1)
            else:
                config.enable_use_gpu(256, device_index())
            self._predictor = inference.create_predictor(config)
        self._input = self._predictor.get_input_handle(self._predictor.get_input_names()[0])
        self._output = self._predictor.get_output_handle(self._predictor.get_output_names()[0])

    def embed(self, image_BHWC: np.ndarray) -> np.ndarray:
        """uint8 RGB [B, H, W, 3] -> [B, D]."""
        return self.run(self.network_input.prepare(image_BHWC))

    def run(self, image_BCHW: np.ndarray) -> np.ndarray:
        """[B, 3, H, W] -> [B, D]."""
        self._input.reshape(image_BCHW.shape)
        self._input.copy_from_cpu(image_BCHW)
        self._predictor.run()
        return self._output.copy_to_cpu()


class OnnxEngine:
    """onnxruntime on an ``.onnx`` file (a layer is exported to a temporary one first); CPU, or this rank's GPU.

    Attributes:
        network_input: what the file asks for; ``run`` converts to it.
        embedding_size: D.
    """

    name = "onnx"

    def __init__(self, model, num_threads: int | None = None):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = num_threads or 1
        options.log_severity_level = 3
        providers = ["CPUExecutionProvider"]
        if check_device(self.name, "cpu", "gpu") == "gpu":
            providers.insert(0, ("CUDAExecutionProvider", {"device_id": device_index()}))
        self._path = model if isinstance(model, str | Path) else type(model).__name__
        with as_onnx(model) as path:
            self.network_input = read_onnx_input(path)
            try:
                self._session = onnxruntime.InferenceSession(str(path), options, providers=providers)
            except Exception as error:  # a provider's or a graph's; onnxruntime has no base class for them
                reason = " ".join(str(error).split())[:200]
                raise UserError(f"{self._path}: onnxruntime cannot run it ({reason})") from None
        if self._session.get_providers()[0] == "CPUExecutionProvider" and len(providers) > 1:
            remedy = "install onnxruntime-gpu or use --device cpu"
            raise UserError(f"{self._path}: onnxruntime cannot use the GPU here; {remedy}")
        (self._input,) = (source.name for source in self._session.get_inputs())
        outputs = self._session.get_outputs()
        shapes = [[size if isinstance(size, int) else None for size in output.shape] for output in outputs]
        self._output = outputs[embedding_output(self._path, shapes)].name
        size, batch = self.network_input.size, self.network_input.batch or 1
        self.embedding_size = self.embed(np.zeros((batch, size, size, 3), np.uint8)).shape[1]

    def run(self, image_BCHW: np.ndarray) -> np.ndarray:
        """[B, C, H, W] -> [B, D]."""
        return self._run(self.network_input.from_signed(image_BCHW))

    def embed(self, image_BHWC: np.ndarray) -> np.ndarray:
        """uint8 RGB [B, H, W, 3] -> [B, D]."""
        return self._run(self.network_input.prepare(image_BHWC))

    def _run(self, images: np.ndarray) -> np.ndarray:
        step = self.network_input.batch or max(1, len(images))
        parts = []
        for start in range(0, len(images), step):
            part = images[start : start + step]
            filled = part
            if self.network_input.batch is not None and len(part) < step:
                filled = np.zeros((step, *part.shape[1:]), part.dtype)
                filled[: len(part)] = part
            (output,) = self._session.run([self._output], {self._input: filled})
            parts.append(embedding_rows(output, len(filled), self._path)[: len(part)])
        return np.concatenate(parts) if len(parts) > 1 else parts[0]


@contextlib.contextmanager
def as_onnx(model) -> Iterator[str | Path]:
    """The path of ``model``, an ``.onnx`` file, or of a temporary one that a layer is exported to."""
    if isinstance(model, str | Path):
        yield model
        return
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        yield save_onnx(model, Path(folder) / "model.onnx")


def device_index() -> int:
    """The number of this process's accelerator (0 on the CPU)."""
    _, _, index = paddle.get_device().partition(":")
    return int(index or 0)


def check_device(engine: str, *devices: str) -> str:
    """The kind of Paddle's current device, one of ``devices``.

    Raises:
        UserError: the engine runs elsewhere only.
    """
    kind = paddle.get_device().partition(":")[0]
    if kind not in devices:
        problem = f"engine {engine!r} runs on {' and '.join(devices)}, not on {paddle.get_device()}"
        raise UserError(f"{problem}; use --engine static or dynamic, or --device cpu")
    return kind


def image_spec(layer) -> paddle.static.InputSpec:
    """The input of a backbone with a free batch size: float32 [-1, 3, H, W] (grey networks take the luma)."""
    return paddle.static.InputSpec([None, 3, layer.input_size, layer.input_size], "float32", "image")


def save_inference_model(layer, prefix: str | Path) -> Path:
    """Write ``layer`` in evaluation mode as a Paddle inference model with a free batch size; returns ``prefix``."""
    with evaluating(layer):
        paddle.jit.save(layer, str(prefix), input_spec=[image_spec(layer)])
    return Path(prefix)


def inference_files(prefix: str | Path) -> tuple[Path, Path]:
    """(program, weights) of an exported model: ``.json`` since Paddle 3.0, ``.pdmodel`` before."""
    prefix = Path(prefix)
    if prefix.suffix in (".json", ".pdmodel", ".pdiparams"):
        prefix = prefix.with_suffix("")
    program = next((p for p in (Path(f"{prefix}.json"), Path(f"{prefix}.pdmodel")) if p.is_file()), None)
    if program is None:
        raise FileNotFoundError(f"{prefix}: no {prefix.name}.json or {prefix.name}.pdmodel there")
    return program, Path(f"{prefix}.pdiparams")


def save_onnx(layer, path: str | Path, opset: int = OPSET) -> Path:
    """Write ``layer`` in evaluation mode as ONNX with a free batch size; needs paddle2onnx."""
    import paddle2onnx

    with tempfile.TemporaryDirectory() as folder, stdout_to_stderr():
        program, weights = inference_files(save_inference_model(layer, Path(folder) / "model"))
        # optimize_tool: the default folds constants with a tool that installs packages by itself.
        paddle2onnx.export(str(program), str(weights), str(path), opset_version=opset, optimize_tool="None")
    return Path(path)


@contextlib.contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """What libraries print from C++ goes to stderr, so that piped tables stay clean."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        os.dup2(2, 1)
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)
