"""Which network a state belongs to, told by the names and shapes of its tensors."""

import re

import numpy as np

from backbones import iresnet, mobilefacenet, vit


def guess_network(state: dict[str, np.ndarray], from_torch: bool) -> dict | None:
    """``network`` and options for ``backbones.build_backbone``, or None if the state is of no known family.

    Args:
        state: named arrays of a backbone.
        from_torch: linear weights are [out, in] (PyTorch) rather than [in, out].
    """
    if "fc.weight" in state and "layer1.0.bn1.weight" in state and "layer1.0.prelu.weight" in _renamed(state):
        return _iresnet(state, from_torch)
    if "conv_sep.layers.0.weight" in state:
        return _mobilefacenet(state, from_torch)
    if "pos_embed" in state and "feature.2.weight" in state:
        return _vit(state, from_torch)
    return None


def _renamed(state: dict[str, np.ndarray]) -> set[str]:
    return {name.replace("._weight", ".weight") for name in state}


def _iresnet(state: dict[str, np.ndarray], from_torch: bool) -> dict | None:
    depths = []
    for stage in range(1, 5):
        found = {int(match[1]) for name in state if (match := re.match(rf"layer{stage}\.(\d+)\.", name))}
        depths.append(len(found))
    network = {found: name for name, found in iresnet.DEPTHS.items()}.get(tuple(depths))
    if network is None:
        return None
    width = state["conv1.weight"].shape[0]
    outputs, inputs = _linear_shape(state["fc.weight"], from_torch)
    return {"network": network, "embedding_size": outputs, **_sized(width, 64, inputs, 8 * width)}


def _mobilefacenet(state: dict[str, np.ndarray], from_torch: bool) -> dict | None:
    width = state["layers.0.layers.0.weight"].shape[0]
    ratio = state["layers.2.layers.0.layers.0.weight"].shape[0] / width
    depths = tuple(
        len({name.split(".")[3] for name in state if re.match(rf"layers\.{stage}\.layers\.\d+\.layers\.", name)}) or 1
        for stage in (1, 3, 5, 7)
    )
    for network, setting in mobilefacenet.SETTINGS.items():
        if (depths, ratio) == (setting["depths"], setting["hidden_ratio"]):
            outputs, _ = _linear_shape(state["features.layers.2.weight"], from_torch)
            side = state["features.layers.0.layers.0.weight"].shape[-1]
            options = {"network": network, "embedding_size": outputs}
            return {**options, **_sized(width, setting["width"], side * side, 1)}
    return None


def _vit(state: dict[str, np.ndarray], from_torch: bool) -> dict | None:
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    _, num_tokens, width = state["pos_embed"].shape
    fitting = [name for name, setting in vit.SETTINGS.items() if setting["depth"] == depth]
    network = next((name for name in fitting if vit.SETTINGS[name]["width"] == width), fitting[0] if fitting else None)
    if network is None:
        return None
    options = {"network": network, "embedding_size": _linear_shape(state["feature.2.weight"], from_torch)[0]}
    side = round(num_tokens**0.5)
    options |= {} if width == vit.SETTINGS[network]["width"] else {"width": width}
    return options if side == 12 else {**options, "input_size": 9 * side}


def _linear_shape(weight: np.ndarray, from_torch: bool) -> tuple[int, int]:
    return weight.shape if from_torch else weight.shape[::-1]


def _sized(width: int, usual_width: int, flattened: int, channels: int) -> dict:
    """``width`` and ``input_size`` where they are not the usual ones; the last map is a 16th of the input."""
    side = round((flattened / channels) ** 0.5)
    options = {} if width == usual_width else {"width": width}
    return options if side == 7 else {**options, "input_size": 16 * side}
