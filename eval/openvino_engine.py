"""OpenVINO on the CPU: bfloat16 where the processor has it; normalisation and mirror images inside the graph.

A call is cut into pieces, each worked off by one of OpenVINO's streams. ``start`` returns at once: images are read and
aligned while the network runs, and the next call's pieces follow the last one's without a gap.

Shapes: B images of a call, P images of a piece, H = W input size in pixels, C channels, D embedding size.
"""

import queue
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from eval.engines import as_onnx, check_device
from eval.network_input import NetworkInput, embedding_output, embedding_rows, read_onnx_input
from utils.errors import UserError
from utils.system import processor

ROWS = 16  # of a piece, mirror images counted: more are no faster, fewer leave the processor's matrix units idle
TYPES = {"fp32": "f32", "bf16": "bf16"}
REAL_BFLOAT16 = {"avx512_bf16", "amx_bf16", "bf16"}  # flags of x86 and ARM; emulated it would be slower than float32


def emulates_bfloat16() -> bool:
    """Whether this processor says that it has no products in bfloat16 of its own."""
    _, flags = processor()
    return bool(flags) and not REAL_BFLOAT16 & flags


class Pending:
    """Embeddings on their way."""

    def __init__(self, pieces: list[Future], assemble: Callable[[list[np.ndarray]], np.ndarray]):
        self._pieces, self._assemble = pieces, assemble

    def result(self) -> np.ndarray:
        """Wait for them."""
        return self._assemble([piece.result() for piece in self._pieces])


class OpenvinoEngine:
    """OpenVINO on an ``.onnx`` file (a layer is exported to a temporary one first).

    Attributes:
        network_input: what the file asks for.
        embedding_size: D.
        precision: ``fp32`` or ``bf16``; may be changed between calls.
    """

    name = "openvino"

    def __init__(self, model, num_threads: int | None = None):
        import openvino

        check_device(self.name, "cpu")
        self.precision = "fp32"
        self._path = model if isinstance(model, str | Path) else type(model).__name__
        self._num_threads = num_threads or 1
        self._core = openvino.Core()
        self._compiled: dict[tuple, _Compiled] = {}
        self._pool = ThreadPoolExecutor(self._num_threads + 1, "openvino")  # one more, so that no stream waits for work
        try:
            with as_onnx(model) as path:
                self.network_input = read_onnx_input(path)
                network = self._core.read_model(str(path))
            shapes = [output.partial_shape for output in network.outputs]
            known = [[side.get_length() if side.is_static else None for side in shape] for shape in shapes]
            self._output = embedding_output(self._path, known)
            self._model = _of_pixels(network, self.network_input)
            probe = self._submit(np.zeros((1, *self._image_shape), np.uint8), False, 1)
            self.embedding_size = probe[0].result().shape[-1]
        except RuntimeError as error:
            raise UserError(f"{self._path}: OpenVINO cannot run it ({' '.join(str(error).split())[:200]})") from None

    @property
    def has_bfloat16(self) -> bool:
        """Whether the processor itself computes in bfloat16."""
        return "BF16" in self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES") and not emulates_bfloat16()

    def start(self, image_BHWC: np.ndarray, view: str = "plain", largest: int = ROWS) -> Pending:
        """Begin to embed uint8 RGB [B, H, W, 3], which must not change until the result is there.

        Args:
            view: ``plain`` or ``mirror`` for [B, D], ``both`` for [B, 2, D].
            largest: images of a piece at most.
        """
        image_BHWC = self.network_input.channels_of(image_BHWC)
        num_images, mirror_BHWC = len(image_BHWC), image_BHWC[:, :, ::-1]
        if num_images == 0:
            shape = (0, 2, self.embedding_size) if view == "both" else (0, self.embedding_size)
            return Pending([], lambda _: np.zeros(shape, np.float32))
        if view != "both":
            return Pending(self._submit(image_BHWC if view == "plain" else mirror_BHWC, False, largest), np.concatenate)
        if self.network_input.batch is None:
            return Pending(self._submit(image_BHWC, True, largest), np.concatenate)
        pieces = [future for part in (image_BHWC, mirror_BHWC) for future in self._submit(part, False, largest)]
        return Pending(pieces, lambda parts: np.concatenate(parts).reshape(2, num_images, -1).swapaxes(0, 1))

    def embed(self, image_BHWC: np.ndarray) -> np.ndarray:
        """uint8 RGB [B, H, W, 3] -> [B, D]."""
        return self.start(image_BHWC).result()

    @property
    def _image_shape(self) -> tuple[int, int, int]:
        return self.network_input.size, self.network_input.size, self.network_input.channels

    def _submit(self, image_BHWC: np.ndarray, both: bool, largest: int) -> list[Future]:
        full = self.network_input.batch or max(1, min(ROWS, largest) // (1 + both))
        step = self.network_input.batch or min(full, -(-len(image_BHWC) // self._num_threads))
        pieces = [image_BHWC[start : start + step] for start in range(0, len(image_BHWC), step)]
        fixed = self.network_input.batch is not None
        return [
            self._pool.submit(self._compile(both, full if fixed or len(piece) == full else None).run, piece)
            for piece in pieces
        ]

    def _compile(self, both: bool, num_images: int | None) -> "_Compiled":
        """The network for pieces of ``num_images``, or of any size: a known size is up to a fifth faster."""
        key = (self.precision, both, num_images)
        if key not in self._compiled:
            # Compiled networks hold copies of the weights; one precision at a time is enough.
            self._compiled = {old: kept for old, kept in self._compiled.items() if old[0] == self.precision}
            model = _with_mirrors(self._model) if both else self._model.clone()
            model.reshape([-1 if num_images is None else num_images, *self._image_shape])
            options = {
                "PERFORMANCE_HINT": "THROUGHPUT",
                "INFERENCE_NUM_THREADS": self._num_threads,
                "INFERENCE_PRECISION_HINT": TYPES[self.precision],
                "ENABLE_CPU_PINNING": False,  # ranks of one machine would all be pinned to its first cores
            }
            compiled = self._core.compile_model(model, "CPU", options)
            self._compiled[key] = _Compiled(compiled, self._output, both, num_images, self._path)
        return self._compiled[key]


class _Compiled:
    """A compiled network and the requests of it that are idle."""

    def __init__(self, compiled, output: int, both: bool, num_images: int | None, path: str | Path):
        self._compiled, self._output, self._both = compiled, output, both
        self._num_images, self._path = num_images, path
        self._idle: queue.SimpleQueue = queue.SimpleQueue()

    def run(self, image_PHWC: np.ndarray) -> np.ndarray:
        """[P, H, W, C] -> [P, D] or, with mirror images, [P, 2, D]; any thread."""
        try:
            request = self._idle.get_nowait()
        except queue.Empty:
            request = self._compiled.create_infer_request()
        num_images = len(image_PHWC)
        padded = (self._num_images or num_images) - num_images
        if padded:
            image_PHWC = np.pad(image_PHWC, ((0, padded), (0, 0), (0, 0), (0, 0)))
        try:
            request.infer({0: np.ascontiguousarray(image_PHWC)}, share_inputs=True)
            output = request.get_output_tensor(self._output).data
            rows = embedding_rows(output, len(image_PHWC) * (1 + self._both), self._path).copy()
        finally:
            self._idle.put(request)
        return rows.reshape(2, num_images, -1).swapaxes(0, 1) if self._both else rows[:num_images]


def _of_pixels(model, network_input: NetworkInput):
    """``model`` with an input of uint8 [any, H, W, C], whatever it asks for."""
    from openvino import Layout, Type
    from openvino.preprocess import PrePostProcessor

    size, channels, batch = network_input.size, network_input.channels, network_input.batch or -1
    own_type = model.input().element_type
    model.reshape([batch, size, size, channels] if network_input.channels_last else [batch, channels, size, size])
    process = PrePostProcessor(model)
    process.input().tensor().set_element_type(Type.u8).set_layout(Layout("NHWC"))
    process.input().model().set_layout(Layout("NHWC" if network_input.channels_last else "NCHW"))
    if network_input.pixels == "raw":
        process.input().preprocess().convert_element_type(own_type)
    else:
        scale, shift = network_input.scale_shift
        steps = process.input().preprocess().convert_element_type(Type.f32)
        steps.mean(-shift / scale).scale(1 / scale).convert_element_type(own_type)
    return process.build()


def _with_mirrors(model):
    """A copy of ``model`` whose batch is followed by its mirror images: [P, H, W, C] -> rows of P, then P mirrored."""
    import openvino
    from openvino import opset13

    model = model.clone()
    inside = model.input().node
    pixels = opset13.parameter(inside.get_partial_shape(), openvino.Type.u8)
    first, last, backwards, width = (np.array([number]) for number in (-1, -(2**31), -1, 2))
    doubled = opset13.concat([pixels, opset13.slice(pixels, first, last, backwards, width)], 0)
    for target in list(inside.output(0).get_target_inputs()):
        target.replace_source_output(doubled.output(0))
    return openvino.Model(model.outputs, [pixels])
