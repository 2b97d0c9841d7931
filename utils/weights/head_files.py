"""Class centres on disk, in one file or in one shard a rank, to one array [C, D].

Shards are contiguous rows in rank order, as the PyTorch reference, the arcface-Paddle and we cut them:
``C // W + (rank < C % W)`` rows each.

Legend: C classes, D embedding size, W ranks.
"""

import re
from pathlib import Path

import numpy as np

from utils.errors import UserError
from utils.weights.states import read_content

SHARDS = (
    re.compile(r"checkpoint_gpu_(?P<rank>\d+)\.pt$"),
    re.compile(r"rank[:_](?P<rank>\d+)_softmax_weight\.(?:pkl|pt|npy)$"),
    re.compile(r"head_(?P<rank>\d+)_of_\d+\.safetensors$"),
)
MOMENTUM = re.compile(r"rank[:_](?P<rank>\d+)_softmax_weight_mom\.(?:pkl|pt|npy)$")


def read_head(path: str | Path) -> dict[str, np.ndarray]:
    """``weight`` [C, D] and, where the files have it, ``momentum`` [C, D].

    Args:
        path: one file (``.safetensors``, ``.npy``, ``.pkl``, ``.pt``), any one shard of several (the others are found
            beside it), a folder of shards, a run of ours or one of its checkpoints, or a folder with
            ``head.safetensors``.

    Raises:
        UserError: nothing there, a shard missing, or shapes that do not fit together.
    """
    path = Path(path)
    if path.is_dir():
        whole = path / "head.safetensors"
        if whole.is_file():
            return read_head(whole)
        latest = path / "latest"
        if latest.is_file():  # a run: its newest checkpoint
            return read_head(path / "checkpoints" / latest.read_text(encoding="utf-8").strip())
        first = next((file for pattern in SHARDS for file in sorted(path.iterdir()) if pattern.search(file.name)), None)
        if first is None:
            known = "head.safetensors, rank:0_softmax_weight.pkl, checkpoint_gpu_0.pt or a checkpoint of ours"
            raise UserError(f"{path}: no class centres there ({known})")
        path = first
    if not path.is_file():
        raise UserError(f"{path}: no such file of class centres")
    pattern = next((pattern for pattern in SHARDS if pattern.search(path.name)), None)
    if pattern is None:
        return _arrays(path)
    shards = [_arrays(file) for file in _by_rank(path, pattern)]
    whole = [key for key in ("weight", "momentum") if all(key in shard for shard in shards)]
    head = {key: np.concatenate([shard[key] for shard in shards]) for key in whole}
    rows, world_size = [len(shard["weight"]) for shard in shards], len(shards)
    expected = [sum(rows) // world_size + (rank < sum(rows) % world_size) for rank in range(world_size)]
    if rows != expected:
        told = f"shards of {rows} rows; {sum(rows)} classes on {world_size} ranks are cut as {expected}"
        raise UserError(f"{path.parent}: {told}; is a shard missing or from another run?")
    momenta = [file for file in path.parent.iterdir() if MOMENTUM.search(file.name)]
    if pattern is SHARDS[1] and momenta:
        head["momentum"] = np.concatenate([_arrays(file)["weight"] for file in _by_rank(momenta[0], MOMENTUM)])
    if "momentum" in head and head["momentum"].shape != head["weight"].shape:
        shapes = f"{list(head['momentum'].shape)} instead of {list(head['weight'].shape)}"
        raise UserError(f"{path}: the momentum is {shapes}; are files of two runs mixed?")
    return head


def _by_rank(path: Path, pattern: re.Pattern) -> list[Path]:
    """All shards beside ``path`` in rank order, none missing."""
    found = {}
    for file in path.parent.iterdir():
        match = pattern.search(file.name)
        if match is not None and (other := found.setdefault(int(match["rank"]), file)) != file:
            told = f"two files of rank {match['rank']}: {other.name} and {file.name}"
            raise UserError(f"{path.parent}: {told}; keep one")
    missing = sorted(set(range(max(found) + 1)) - set(found))
    if missing:
        raise UserError(f"{path.parent}: {len(found)} shards like {path.name}, but rank {missing[0]} is missing")
    return [found[rank] for rank in sorted(found)]


def _arrays(path: Path) -> dict[str, np.ndarray]:
    """``weight`` and perhaps ``momentum`` of one file."""
    head = {key: value for key, value in _content(path).items() if isinstance(value, np.ndarray)}
    weight = head.get("weight")
    if weight is None or weight.ndim != 2:
        found = "nothing" if weight is None else f"shape {list(weight.shape)}"
        raise UserError(f"{path}: class centres [classes, embedding size] expected, found {found}")
    if not np.isfinite(weight).all():
        raise UserError(f"{path}: the class centres hold values that are not finite")
    return {key: np.ascontiguousarray(value, np.float32) for key, value in head.items()}


def _content(path: Path) -> dict[str, np.ndarray | None]:
    if path.suffix.lower() == ".npy":
        try:
            return {"weight": np.load(path, allow_pickle=False)}
        except ValueError as error:
            raise UserError(f"{path}: not an array of numbers ({error})") from None
    content = read_content(path)
    if isinstance(content, dict) and any(str(key).startswith("rows/") for key in content):  # a shard of ours
        content = {key.partition("/")[2]: value for key, value in content.items() if key.startswith("rows/")}
    return _from_torch(path, content)


def _from_torch(path: Path, content: object) -> dict[str, np.ndarray | None]:
    """Of a bare tensor, of a head's state, or of a training checkpoint (whose optimiser has the momentum)."""
    if not isinstance(content, dict) or "state_dict_softmax_fc" not in content:
        return _pick(content)
    head = _pick(content["state_dict_softmax_fc"])
    optimizer = content.get("state_optimizer") or {}
    states = optimizer.get("state") if isinstance(optimizer, dict) else None
    states = states if isinstance(states, dict) else {}
    numbers = sorted(key for key, state in states.items() if isinstance(key, int) and isinstance(state, dict))
    buffers = [states[number].get("momentum_buffer") for number in numbers]
    shape = np.shape(head.get("weight"))
    fitting = [b for b in buffers if isinstance(b, np.ndarray) and b.shape == shape]
    # The class weight is the optimiser's last parameter; a linear layer before it could have the same shape.
    return {**head, "momentum": fitting[-1] if fitting else head.get("momentum")}


def _pick(content: object) -> dict[str, np.ndarray | None]:
    if isinstance(content, tuple | list):  # how Paddle pickles one tensor: (name, array)
        content = next((part for part in content if isinstance(part, np.ndarray)), None)
    if isinstance(content, np.ndarray):
        return {"weight": content}
    if not isinstance(content, dict):
        return {}
    if "weight" in content:
        names = ("momentum", "weight_mom")
        return {"weight": content["weight"], "momentum": next((content[n] for n in names if n in content), None)}
    arrays = [value for value in content.values() if isinstance(value, np.ndarray) and value.ndim == 2]
    return {"weight": arrays[0]} if len(arrays) == 1 else {}
