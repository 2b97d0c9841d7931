"""Weights on disk to named arrays, and arrays into a layer: strict, by name, never by position.

A *state* is ``dict[str, np.ndarray]``. Two spellings exist: Paddle's (``bn1._mean``, linear weights [in, out]), which
our files use, and PyTorch's (``bn1.running_mean``, ``num_batches_tracked``, linear weights [out, in]). Which tensors
are linear weights is asked of the layer, not guessed from shapes: a square matrix is transposed like any other.
"""

import os
import struct
import sys
from collections.abc import Collection
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from utils.errors import UserError
from utils.files import written_whole
from utils.weights.onnx_walk import read_onnx
from utils.weights.safe_pickle import Name, load_weights_pickle
from utils.weights.torch_pickle import load_torch

TORCH = (".pt", ".pth", ".ckpt", ".tar")
RENAMED = {"running_mean": "_mean", "running_var": "_variance"}  # PyTorch -> Paddle, last part of a name


def read_state(path: str | Path) -> dict[str, np.ndarray]:
    """The backbone's state in a weights file, spelled as the file spells it; no code of a file is executed.

    What a file is decides its content, not its name: ``.pth.tar``, ``.ckpt`` and the like are PyTorch files.

    Args:
        path: a file of Paddle (``.pdparams``, ``.pkl``), of PyTorch (a bare state or a training checkpoint),
            ``.safetensors`` or ``.onnx`` (an iResNet or MobileFaceNet, whose graph is walked).

    Raises:
        UserError: the file is of another kind, is damaged or holds no named arrays.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such weights file")
    if path.suffix.lower() == ".onnx":
        return read_onnx(path)
    return backbone_part(read_content(path), path)


def read_content(path: str | Path) -> object:
    """All that a weights file holds (PyTorch, safetensors, Paddle's pickles), told by its first bytes."""
    kind = _kind(path)
    if kind == "safetensors":
        return read_safetensors(path)
    return load_torch(path) if kind == "torch" else load_weights_pickle(path)


def is_torch_file(path: str | Path) -> bool:
    """True for a file of ``torch.save`` and for ONNX, whose linear weights are [out, in]."""
    return Path(path).suffix.lower() == ".onnx" or _kind(path) == "torch"


def _kind(path: str | Path) -> str:
    with open(path, "rb") as file:
        head = file.read(16)
    if head.startswith((b"PK", _TORCH_STREAM)):
        return "torch"
    if len(head) >= 9 and head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] < 1 << 32:
        return "safetensors"
    if Path(path).suffix.lower() == ".safetensors":
        return "safetensors"  # a damaged one, named as such
    return "torch" if Path(path).suffix.lower() in TORCH else "pickle"


_TORCH_STREAM = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"
_STATES = ("state_dict_backbone", "backbone", "state_dict", "model_state_dict")
_NESTED = (*_STATES, "model", "net", "network", "params", "weights")
_STEMS = ("conv1.weight", "layers.0.layers.0.weight", "patch_embed.proj.weight")  # the first tensor of our families


def backbone_part(content: object, path: str | Path) -> dict[str, np.ndarray]:
    """The backbone's named arrays inside what a file holds (a state, or a checkpoint with one in it).

    Names of wrappers before it (``module.``, ``model.``, ``_orig_mod.``, ``features.module.``, in any nesting) are
    taken off; a head beside it is passed over, which a line on stderr says.
    """
    for _ in range(len(_NESTED)):
        inner = content if isinstance(content, dict) else {}
        key = next((key for key in _NESTED if isinstance(inner.get(key), dict)), None)
        if key is None:
            break
        content = inner[key]
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, not named weights")
    state = {str(name): value for name, value in content.items() if isinstance(value, np.ndarray)}
    if not state:
        keys = ", ".join(map(str, list(content)[:5])) or "none"
        kind = next((value.full for value in content.values() if isinstance(value, Name)), None)
        what = "" if kind is None else f" ({kind} is there, and nothing was executed: save model.state_dict())"
        raise UserError(f"{path}: holds no named arrays; its keys are {keys}{what}")
    foreign = {str(name): value.full for name, value in content.items() if isinstance(value, Name)}
    prefix = _prefix([*state, *foreign])
    for name, kind in foreign.items():
        if name.startswith(prefix) and "." in name:  # a parameter's name; "args" beside a bare state is passed over
            found = f"{name} is a {kind}, not a plain tensor, and was not executed"
            raise UserError(f"{path}: {found}; where it was trained, save the state with plain tensors")
    beside = [name for name in state if not name.startswith(prefix)]
    if beside and os.environ.get("PADDLE_TRAINER_ID", "0") == "0":
        told = f"{path}: passed over beside the backbone ({prefix}*): {_first(3, beside)}"
        print(told, file=sys.stderr, flush=True)
    return {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}


def _first(count: int, names: list[str]) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def _prefix(state: Collection[str]) -> str:
    """What stands before every name of the backbone: before the stem of most tensors, or before all names."""
    before = {name[: -len(stem)] for name in state for stem in _STEMS if name == stem or name.endswith("." + stem)}
    if before:
        sizes = {prefix: sum(name.startswith(prefix) for name in state) for prefix in sorted(before)}
        return max(sizes, key=lambda prefix: (sizes[prefix], -len(prefix)))
    prefix = ""
    while True:  # a network of another family: wrappers that all names share
        found = next((w for w in _WRAPPERS if all(name.startswith(prefix + w) for name in state)), None)
        if found is None:
            return prefix
        prefix += found


_WRAPPERS = ("module.", "_orig_mod.", "model.", "backbone.", "net.", "network.")


def is_torch_spelling(state: dict[str, np.ndarray]) -> bool:
    """True if the batch norms of a state are named as PyTorch names them."""
    return any(name.endswith((".running_mean", ".running_var", ".num_batches_tracked")) for name in state)


def paddle_spelling(layer, state: dict[str, np.ndarray], from_torch: bool | None = None) -> dict[str, np.ndarray]:
    """``state`` with the names and the linear layout of ``layer``'s own ``state_dict``.

    Args:
        layer: the Paddle layer the state is meant for.
        state: in either spelling; arcface-Paddle's ``prelu._weight`` is understood too.
        from_torch: whether linear weights are [out, in]; None: seen from the batch norms' names.
    """
    from_torch = is_torch_spelling(state) if from_torch is None else from_torch
    linears = _linear_weights(layer)
    own = layer.state_dict()
    result = {}
    for name, value in state.items():
        head, _, last = name.rpartition(".")
        if last == "num_batches_tracked":
            continue
        if last == "_weight" and name not in own:
            last = "weight"
        name = f"{head}.{RENAMED.get(last, last)}" if head else RENAMED.get(last, last)
        result[name] = value.T if from_torch and name in linears and value.ndim == 2 else value
    return result


def torch_spelling(layer) -> dict[str, np.ndarray]:
    """``layer``'s state as PyTorch spells it, with ``num_batches_tracked``, so that it loads strictly there."""
    linears = _linear_weights(layer)
    back = {paddle: torch for torch, paddle in RENAMED.items()}
    result = {}
    for name, tensor in layer.state_dict().items():
        value = tensor.numpy()
        head, _, last = name.rpartition(".")
        prefix = f"{head}." if head else ""
        result[prefix + back.get(last, last)] = np.ascontiguousarray(value.T) if name in linears else value
        if last == "_variance":
            result[f"{prefix}num_batches_tracked"] = np.zeros((), np.int64)
    return result


def load_state(layer, state: dict[str, np.ndarray], source: str | Path, from_torch: bool | None = None) -> None:
    """Fill ``layer`` with ``state``; every name and shape must fit.

    Raises:
        UserError: one line naming ``source`` and what is missing, left over or of another shape.
    """
    own, state = layer.state_dict(), paddle_spelling(layer, state, from_torch)
    shapes = {name: (list(state[name].shape), list(own[name].shape)) for name in own if name in state}
    misfits = {
        "missing": [name for name in own if name not in state],
        "left over": [name for name in state if name not in own],
        "shape": [
            f"{name} is {found} instead of {wanted}" for name, (found, wanted) in shapes.items() if found != wanted
        ],
    }
    problems = [f"{label}: {_first(4, names)}" for label, names in misfits.items() if names]
    if problems:
        raise UserError(f"{source} does not fit {type(layer).__name__}: {'; '.join(problems)}")
    for name, tensor in own.items():
        value = state[name]
        if not np.isfinite(value).all():
            raise UserError(f"{source}: {name} holds values that are not finite")
        tensor.set_value(np.ascontiguousarray(value).astype(str(tensor.dtype).rsplit(".", 1)[-1]))


def save_pdparams(path: str | Path, arrays: dict[str, np.ndarray]) -> None:
    """Weights as ``paddle.load`` and ``set_state_dict`` take them, written aside and renamed."""
    import paddle

    place = paddle.CPUPlace()
    with written_whole(path) as aside:
        paddle.save({name: paddle.to_tensor(value, place=place) for name, value in arrays.items()}, str(aside))


def _linear_weights(layer) -> set[str]:
    from paddle import nn

    linears = [name for name, part in layer.named_sublayers(include_self=True) if isinstance(part, nn.Linear)]
    return {f"{name}.weight".lstrip(".") for name in linears}


def read_safetensors(path: str | Path) -> dict[str, np.ndarray]:
    """Every array of a safetensors file; a damaged one is a ``UserError``."""
    try:
        return load_file(path)
    except (SafetensorError, ValueError, struct.error) as error:
        raise UserError(f"{path}: damaged safetensors file ({error})") from None
