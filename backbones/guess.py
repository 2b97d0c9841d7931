"""Which network a state belongs to, told by the names and shapes of its tensors."""

import re

import numpy as np

DEPTHS = {
    (2, 2, 2, 2): "iresnet18",
    (3, 4, 6, 3): "iresnet34",
    (3, 4, 14, 3): "iresnet50",
    (3, 13, 30, 3): "iresnet100",
    (6, 26, 60, 6): "iresnet200",
}

VIT = {(12, 256): "vit_t", (12, 512): "vit_s", (24, 512): "vit_b", (24, 768): "vit_l"}  # (depth, width)


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
    network = DEPTHS.get(tuple(depths))
    if network is None:
        return None
    width = state["conv1.weight"].shape[0]
    outputs, inputs = _linear_shape(state["fc.weight"], from_torch)
    return {"network": network, "embedding_size": outputs, **_sized(width, 64, inputs, 8 * width)}


def _mobilefacenet(state: dict[str, np.ndarray], from_torch: bool) -> dict:
    width = state["layers.0.layers.0.weight"].shape[0]
    large = "layers.1.layers.0.layers.0.layers.0.weight" in state
    outputs, _ = _linear_shape(state["features.layers.2.weight"], from_torch)
    side = state["features.layers.0.layers.0.weight"].shape[-1]
    options = {"network": "mobilefacenet_large" if large else "mobilefacenet", "embedding_size": outputs}
    return {**options, **_sized(width, 256 if large else 128, side * side, 1)}


def _vit(state: dict[str, np.ndarray], from_torch: bool) -> dict | None:
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    _, num_tokens, width = state["pos_embed"].shape
    network = VIT.get((depth, width)) or next((name for (blocks, _), name in VIT.items() if blocks == depth), None)
    if network is None:
        return None
    options = {"network": network, "embedding_size": _linear_shape(state["feature.2.weight"], from_torch)[0]}
    side = round(num_tokens**0.5)
    options |= {} if (depth, width) in VIT else {"width": width}
    return options if side == 12 else {**options, "input_size": 9 * side}


def _linear_shape(weight: np.ndarray, from_torch: bool) -> tuple[int, int]:
    return weight.shape if from_torch else weight.shape[::-1]


def _sized(width: int, usual_width: int, flattened: int, channels: int) -> dict:
    """``width`` and ``input_size`` where they are not the usual ones; the last map is a 16th of the input."""
    side = round((flattened / channels) ** 0.5)
    options = {} if width == usual_width else {"width": width}
    return options if side == 7 else {**options, "input_size": 16 * side}
