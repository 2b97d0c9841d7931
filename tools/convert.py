"""Move weights between frameworks: checked by name and shape, and by the embeddings of a fixed batch.

    python tools/convert.py backbone.pth backbone.pdparams                    # PyTorch -> Paddle
    python tools/convert.py w600k_r50.onnx backbone.safetensors               # insightface ONNX, batch norms folded
    python tools/convert.py run/checkpoint_gpu_0.pt work_dirs/converted/      # backbone, class centres of all ranks
    python tools/convert.py emore_arcface/ work_dirs/converted/               # arcface-Paddle's output folder
    python tools/convert.py "run/rank:0_softmax_weight.pkl" head.safetensors  # class centres alone
    python tools/convert.py work_dirs/run model.pt                            # ours -> what the PyTorch one loads

Sources: .pt .pth (never executed), .pdparams, .safetensors, .onnx, a checkpoint's shard (the others are found beside
it), a run directory. Outputs: .pdparams, .safetensors, .pt/.pth, or a folder, which becomes a run directory
(config.yaml with the network, backbone.pdparams, head.safetensors, head_momentum.safetensors) that every tool takes
as --model.

The source is evaluated by itself (numpy in float64, or onnxruntime), the written file is read back, and the largest
difference of their embeddings is printed; above the tolerance nothing is left behind.
"""

import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import paddle
import yaml
from safetensors.numpy import save_file

from backbones import build_backbone
from backbones.guess import guess_network
from eval.embed import chosen_options, model_options
from tools.numpy_forward import reference_embedding
from utils.data.labels import copy_identities
from utils.errors import COUNT, CommandLine, UserError, check_ranges, one_line_errors
from utils.files import write_text
from utils.weights.head_files import SHARDS, read_head
from utils.weights.states import (
    TORCH,
    is_torch_file,
    is_torch_spelling,
    load_state,
    read_safetensors,
    read_state,
    save_pdparams,
    torch_spelling,
)
from utils.weights.torch_pickle import save_torch

BATCH, SEED = 2, 2021
HALF, HALF_TOLERANCE = "onnxruntime in float16", 1e-2  # its rounding is 5e-4 of every value, through all layers
BACKBONE_OUTPUTS = (".pdparams", ".safetensors", ".pt", ".pth")
HEAD_OUTPUTS = (".safetensors", ".npy", ".pt", ".pth")


@dataclass(frozen=True)
class Source:
    """What a source holds: a backbone's state (and how it is spelled), class centres, or both."""

    path: Path
    state: dict[str, np.ndarray] | None
    from_torch: bool
    options: dict | None  # network and options, where the source or its shapes tell
    head: dict[str, np.ndarray] | None


def open_source(path: Path) -> Source:
    """Read a source of any kind.

    Raises:
        UserError: nothing usable there.
    """
    if path.is_dir():
        backbone = path / "backbone.pdparams"
        shards = sorted(p for p in path.iterdir() if any(pattern.search(p.name) for pattern in SHARDS))
        head = read_head(path) if shards or (path / "head.safetensors").is_file() else None
        if backbone.is_file():
            state = read_state(backbone)
            options = model_options(path) or guess_network(state, False)
            return Source(backbone, state, is_torch_spelling(state), options, head)
        if shards and shards[0].suffix == ".pt":
            return open_source(shards[0])
        if head is None:
            raise UserError(f"{path}: no backbone.pdparams, checkpoint_gpu_0.pt or class centres in this folder")
        return Source(path, None, False, None, head)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if _is_head(path):
        return Source(path, None, False, None, read_head(path))
    state = read_state(path)
    from_torch = is_torch_spelling(state) or is_torch_file(path)
    told = None if path.suffix.lower() == ".onnx" else model_options(path.parent)
    head = read_head(path) if SHARDS[0].search(path.name) else None
    return Source(path, state, from_torch, told or guess_network(state, from_torch), head)


def _is_head(path: Path) -> bool:
    """True for class centres on their own: told by the name, else by there being one matrix and nothing else."""
    if any(pattern.search(path.name) for pattern in SHARDS[1:]) or path.suffix.lower() == ".npy":
        return True
    return path.suffix.lower() == ".safetensors" and set(read_safetensors(path)) <= {"weight", "momentum"}


def build(options: dict):
    """A backbone in evaluation mode from ``network`` and options."""
    options = dict(options)
    layer = build_backbone(options.pop("network"), **options)
    layer.eval()
    return layer


def fixed_batch(layer) -> np.ndarray:
    """The images every conversion is checked on: [2, 3, H, W] float32 in [-1, 1], the same each time.

    Their values are those of whole pixels, which a network that takes uint8 sees unrounded.
    """
    shape = (BATCH, 3, layer.input_size, layer.input_size)
    return (np.random.default_rng(SEED).integers(0, 256, shape) / 127.5 - 1).astype(np.float32)


def run_layer(layer, image_BCHW: np.ndarray) -> np.ndarray:
    """Embeddings by the dynamic graph."""
    with paddle.no_grad():
        return layer(paddle.to_tensor(image_BCHW)).numpy()


def source_embedding(source: Source, image_BCHW: np.ndarray) -> tuple[np.ndarray | None, str]:
    """(embedding of the source evaluated by itself, by what), or (None, ...) where nothing can."""
    if source.path.suffix.lower() == ".onnx":
        from eval.engines import OnnxEngine

        try:
            engine = OnnxEngine(source.path)
            half = engine.network_input.dtype == "float16"
            return engine.run(image_BCHW), HALF if half else "onnxruntime"
        except ImportError:
            raise UserError(f"{source.path}: checking it needs onnxruntime: pip install onnxruntime") from None
    return reference_embedding(source.state, source.from_torch, image_BCHW), "numpy in float64"


def written_embedding(path: Path, options: dict, image_BCHW: np.ndarray) -> np.ndarray:
    """Embedding of a written file, read back."""
    state = read_state(path)
    if path.suffix in TORCH:
        result = reference_embedding(state, True, image_BCHW)
        if result is not None:
            return result
    layer = build(options)
    load_state(layer, state, path, path.suffix in TORCH)
    return run_layer(layer, image_BCHW)


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write named arrays in the format that the suffix names; ``.npy`` holds ``weight`` alone."""
    if path.suffix in TORCH:
        save_torch(path, arrays)
    elif path.suffix == ".pdparams":
        save_pdparams(path, arrays)
    elif path.suffix == ".npy":
        np.save(path, arrays["weight"])
    else:
        save_file(arrays, str(path), metadata={"spelling": "paddle"})


def convert(source: Source, output: Path, network: str | None, tolerance: float) -> None:
    """Write ``source`` to ``output`` and print what was written and the difference found.

    Raises:
        UserError: names or shapes that do not fit, an output that cannot hold the source, a difference too large.
    """
    as_folder = output.suffix == "" or output.is_dir()
    if as_folder and source.path.resolve() in (output.resolve(), (output / "backbone.pdparams").resolve()):
        raise UserError(f"{output}: is the source itself; name another output")
    if as_folder and (output / "checkpoints").exists():
        raise UserError(f"{output}: holds a training run; name another folder")
    allowed = HEAD_OUTPUTS if source.state is None else BACKBONE_OUTPUTS
    if not as_folder and output.suffix not in allowed:
        hint = "; python tools/export.py writes it" if output.suffix == ".onnx" else ""
        raise UserError(f"{output}: cannot write {output.suffix}; use {', '.join(allowed)} or a folder{hint}")
    if output.exists() and not as_folder and output.resolve() == source.path.resolve():
        raise UserError(f"{output}: is the source itself; name another output")
    output.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=".converting_", dir=output.parent))
    try:
        if source.state is not None:
            name = "backbone.pdparams" if as_folder else output.name
            options = chosen_options(source.options, network, source.path)
            _convert_backbone(source, aside / name, options, tolerance, as_folder)
        if source.head is not None and (as_folder or source.state is None):
            name = aside / ("head.safetensors" if as_folder else output.name)
            write_arrays(name, {"weight": source.head["weight"]})
            if "momentum" in source.head:  # a file of its own beside it
                write_arrays(name.with_stem(f"{name.stem}_momentum"), {"weight": source.head["momentum"]})
            print("class centres " + ", ".join(f"{key} {list(value.shape)}" for key, value in source.head.items()))
        elif source.head is not None:
            print(f"class centres {list(source.head['weight'].shape)} stay behind: a folder as output takes them along")
        target = output if as_folder else output.parent
        target.mkdir(exist_ok=True)
        for file in sorted(aside.iterdir()):
            file.replace(target / file.name)
            print(f"wrote {target / file.name}")
        if as_folder and (labels := copy_identities(source.path, target)):
            print(f"wrote {labels}")
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _convert_backbone(source: Source, path: Path, options: dict, tolerance: float, with_config: bool) -> None:
    layer = build(options)
    load_state(layer, source.state, source.path, source.from_torch)
    num_values = sum(value.size for value in source.state.values())
    print(f"{source.path}: {options['network']}, {len(source.state)} tensors, {num_values:,} values, all matched")
    if source.path.suffix.lower() == ".onnx":
        print("folded batch norms have no statistics: the weights are for inference; fine-tuning must warm up anew")
    own = {name: tensor.numpy() for name, tensor in layer.state_dict().items()}
    write_arrays(path, torch_spelling(layer) if path.suffix in TORCH else own)
    image = fixed_batch(layer)
    expected, how = source_embedding(source, image)
    if expected is None:
        expected, how = run_layer(layer, image), "the dynamic graph (no independent forward for this network)"
    if how == HALF:
        tolerance = max(tolerance, HALF_TOLERANCE)
    written = written_embedding(path, options, image)
    scale = float(np.abs(expected).max())
    difference = float(np.abs(written - expected).max())
    found = f"largest difference {difference:.2e} of values up to {scale:.3g} (tolerance {tolerance:g} of max(1, that))"
    print(f"checked on {BATCH} fixed images against {how}: {found}")
    if not difference <= tolerance * max(1.0, scale):
        told = f"the converted weights differ by {difference:.3g} in embeddings up to {scale:.3g}"
        raise UserError(f"{source.path}: {told}; nothing was written")
    if with_config:
        section = {**options, "embedding_size": layer.embedding_size, "input_size": layer.input_size}
        write_text(path.with_name("config.yaml"), yaml.safe_dump({"model": section}, sort_keys=False))


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = CommandLine(__doc__)
    parser.add_argument("source", type=Path, help="weights file, checkpoint shard or run directory")
    parser.add_argument("output", type=Path, help="file to write (.pdparams .safetensors .pt .pth .npy) or folder")
    parser.add_argument("--network", help="backbone name; default: told by the source's names and shapes")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="largest difference of embeddings allowed")
    args = parser.parse_args(argv)
    check_ranges(args, tolerance=COUNT)
    convert(open_source(args.source), args.output, args.network, args.tolerance)


if __name__ == "__main__":
    main()
