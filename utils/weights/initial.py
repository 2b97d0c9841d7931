"""Weights to start a fine-tuning from, and stages that stay as they are."""

from pathlib import Path

import numpy as np

from utils.errors import UserError
from utils.weights.head_files import read_head
from utils.weights.states import is_torch_file, is_torch_spelling, load_state, read_state


def load_initial(
    backbone, head, backbone_path: str | None, head_path: str | None, freeze: tuple[str, ...], optional: bool = False
) -> str | None:
    """Fill a new backbone and head from files, then freeze parameters; a note if ``optional`` files are not there.

    Args:
        backbone_path: what ``utils.weights.states.read_state`` reads, a run directory, or a checkpoint of one.
        head_path: class centres [C, D], anything ``utils.weights.head_files.read_head`` reads: one file, the shards of
            several ranks, a run directory (its newest checkpoint), a checkpoint, a folder that tools/convert.py made.
        freeze: leading parts of parameter names (``layer1`` means ``layer1`` and ``layer1.…``); whole layers among
            them run in evaluation mode, so their batch-norm statistics stay too.

    Raises:
        UserError: a file that does not fit; a name in ``freeze`` that no parameter starts with.
    """
    missing = [path for path in (backbone_path, head_path) if optional and path is not None and not Path(path).exists()]
    if backbone_path is not None and backbone_path not in missing:
        path = Path(backbone_path)
        if path.is_dir():  # a run, or one of its checkpoints
            names = ("backbone.pdparams", "backbone.safetensors")
            path = next((path / name for name in names if (path / name).is_file()), path / names[0])
        if not path.is_file():
            raise UserError(f"init.backbone: {path}: no such file")
        state = read_state(path)
        load_state(backbone, state, path, is_torch_spelling(state) or is_torch_file(path))
    if head_path is not None and head_path not in missing:
        if not Path(head_path).exists():
            raise UserError(f"init.head: {head_path}: no such file")
        weight, shape = read_head(head_path)["weight"], (head.shard.num_classes, head.embedding_size)
        if weight.shape != shape:
            told = f"class centres of shape {list(shape)} were expected, found {list(weight.shape)}"
            raise UserError(f"init.head: {head_path}: {told}")
        head.weight.set_value(np.ascontiguousarray(weight[head.shard.start : head.shard.stop]))
    for prefix in freeze:
        named = [p for name, p in backbone.named_parameters() if name == prefix or name.startswith(prefix + ".")]
        if not named:
            stages = sorted({name.partition(".")[0] for name, _ in backbone.named_parameters()})
            raise UserError(f"init.freeze: no parameter starts with {prefix!r}; this network has {', '.join(stages)}")
        for parameter in named:
            parameter.stop_gradient = True
        for name, part in backbone.named_sublayers():
            if name == prefix or name.startswith(prefix + "."):
                part.eval()  # a frozen stage keeps its batch-norm statistics too
    return f"init.optional: {', '.join(missing)} is not there; starting from random weights" if missing else None
