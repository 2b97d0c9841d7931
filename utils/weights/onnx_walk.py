"""Weights out of an ONNX file whose names are lost and whose batch norms are folded, by walking its graph.

Exporters merge a batch norm into the convolution before it and number the tensors anew. What remains is the structure:
from the image input the walk follows iResNet blocks (BN-conv-PReLU-conv plus shortcut) or MobileFaceNet bottlenecks and
gives every tensor the name it has in the public PyTorch checkpoints. A folded batch norm becomes one that only adds the
convolution's bias. Batch norms that are still there are kept. Needs the ``onnx`` package.

The walk knows shapes from the tensors, so any depth and width is found; what it does not know, it refuses by node.
"""

from pathlib import Path

import numpy as np

from utils.errors import UserError
from utils.weights.safe_pickle import refuse_other_kinds

EPSILON = 1e-5  # of our batch norms; another one in the file is moved into the scale
PASSED_OVER = ("Identity", "Dropout", "Cast")
SHAPES = ("Flatten", "Reshape", "Squeeze", "Unsqueeze")  # the order of an embedding's values stays as it is
State = dict[str, np.ndarray]


class Graph:
    """An ONNX graph as nodes reached from the image input."""

    def __init__(self, path: str | Path):
        try:
            import onnx
            from onnx import numpy_helper
        except ImportError:
            raise UserError(f"{path}: reading weights out of ONNX needs the package onnx: pip install onnx") from None
        self.path = path
        try:
            graph = onnx.load(str(path)).graph
        except FileNotFoundError:
            raise
        except Exception as error:  # protobuf raises classes of its own, by version
            with open(path, "rb") as file:
                refuse_other_kinds(path, file.read(1024), "an ONNX file")
            told = " ".join(str(error).split())[:100]
            raise UserError(f"{path}: not an ONNX file that can be read ({told})") from None
        self.constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
        self.users: dict[str, list] = {}
        self.visited: set[int] = set()
        self.nodes = []
        for node in graph.node:
            if node.op_type == "Constant":
                if (value := self.attributes(node).get("value")) is not None:
                    self.constants[node.output[0]] = numpy_helper.to_array(value)
            elif not self._fold(node):
                self.nodes.append(node)
                for value in dict.fromkeys(node.input):
                    self.users.setdefault(value, []).append(node)
        inputs = [value for value in graph.input if value.name not in self.constants]
        if len(inputs) != 1:
            raise UserError(f"{path}: {len(inputs)} inputs, one image input expected")
        self.input, self.input_type = inputs[0].name, inputs[0].type.tensor_type
        shown = [side.dim_value if side.dim_value > 0 else "?" for side in self.input_type.shape.dim]
        if len(shown) == 4 and shown[1] not in (1, 3, "?") and shown[3] not in (1, 3):
            channels = min(side for side in shown[1::2] if side != "?")
            raise UserError(f"{path}: its input is {shown}, {channels} channels; RGB (3) or grey (1) is needed")
        self.outputs = {value.name for value in graph.output}

    def attributes(self, node) -> dict:
        """Attributes of ``node`` by name."""
        from onnx import helper

        return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}

    def following(self, value: str) -> tuple[str, list]:
        """``value`` behind pass-through nodes, and the nodes that use it."""
        while True:
            users = self.users.get(value, [])
            if len(users) != 1 or users[0].op_type not in PASSED_OVER:
                return value, users
            self.visited.add(id(users[0]))
            value = users[0].output[0]

    def peek(self, value: str, *kinds: str):
        """The node of one of ``kinds`` that uses ``value``, or None."""
        return next((node for node in self.following(value)[1] if node.op_type in kinds), None)

    def take(self, value: str, *kinds: str):
        """As ``peek``, but it must be there; marks it as walked."""
        node = self.peek(value, *kinds)
        if node is None:
            found = ", ".join(node.op_type for node in self.following(value)[1]) or "the end of the graph"
            told = f"expected {' or '.join(kinds)} after {value!r}, found {found}"
            raise UserError(f"{self.path}: {told}; the graph is neither an iResNet nor a MobileFaceNet")
        self.visited.add(id(node))
        return node

    def constant(self, node, position: int) -> np.ndarray:
        """The constant input of ``node`` at ``position``, as float32."""
        name = node.input[position]
        if name not in self.constants:
            raise UserError(f"{self.path}: input {position} of {node.op_type} {node.name!r} is no constant")
        return np.asarray(self.constants[name], np.float32)

    def _fold(self, node) -> bool:
        """Compute a node that only rearranges constants; False if it is not one."""
        if not node.input or node.input[0] not in self.constants:
            return False
        array, attributes = self.constants[node.input[0]], self.attributes(node)
        second = self.constants.get(node.input[1]) if len(node.input) > 1 else None
        if node.op_type in ("Identity", "Cast"):
            result = array
        elif node.op_type == "Transpose":
            result = array.transpose(attributes.get("perm"))
        elif node.op_type == "Reshape" and second is not None:
            result = array.reshape([array.shape[i] if side == 0 else side for i, side in enumerate(second.tolist())])
        elif node.op_type in ("Unsqueeze", "Squeeze"):
            axes = tuple(attributes.get("axes", [] if second is None else second.tolist()))
            result = np.expand_dims(array, axes) if node.op_type == "Unsqueeze" else np.squeeze(array, axes or None)
        else:
            return False
        self.constants[node.output[0]] = result
        return True


def read_onnx(path: str | Path) -> State:
    """State of the iResNet or MobileFaceNet in an ONNX file, spelled as PyTorch checkpoints are.

    Scaling of raw pixels inside the graph (old exports) is moved into the first convolution.

    Raises:
        UserError: no ONNX file, a quantised network, or a structure that the walk does not know.
    """
    graph = Graph(path)
    if any(node.op_type == "DequantizeLinear" for node in graph.nodes):
        told = "is quantised, its weights are no longer those of training"
        raise UserError(f"{path}: {told}; it runs with --engine openvino or onnx")
    value, scale = _pixel_scaling(graph)
    value = _channels_first(graph, value)
    state: State = {}
    if any(graph.attributes(node).get("group", 1) > 1 for node in graph.nodes if node.op_type == "Conv"):
        value = _walk_mobilefacenet(graph, value, state)
        stem = "layers.0.layers.0.weight"
    else:
        value = _walk_iresnet(graph, value, state)
        stem = "conv1.weight"
    state[stem] = state[stem] * np.float32(scale)
    if state[stem].shape[1] not in (1, 3):
        raise UserError(f"{path}: takes images of {state[stem].shape[1]} channels; RGB (3) or grey (1) is needed")
    value, users = graph.following(_flattened(graph, value))
    if users or value not in graph.outputs:
        what = users[0].op_type if users else "another output"
        raise UserError(f"{path}: after the embedding comes {what}; only the raw embedding can be taken over")
    layers = ("Conv", "Gemm", "MatMul", "BatchNormalization", "PRelu")
    left = [node for node in graph.nodes if id(node) not in graph.visited and node.op_type in layers]
    if left:
        raise UserError(f"{path}: {len(left)} layers are left over, the first is {left[0].op_type} {left[0].name!r}")
    return state


def _channels_first(graph: Graph, value: str) -> str:
    """Behind the transposition at the input of a network that takes [B, H, W, 3]."""
    value, _ = graph.following(value)
    node = graph.peek(value, "Transpose")
    if node is None or list(graph.attributes(node).get("perm", [])) != [0, 3, 1, 2]:
        return value
    return graph.following(graph.take(value, "Transpose").output[0])[0]


def _pixel_scaling(graph: Graph) -> tuple[str, float]:
    """(the value behind ``(x - 127.5) * k`` at the input, 127.5 k), or (the input, 1)."""
    value = _channels_first(graph, graph.input)
    node = graph.peek(value, "Sub")
    if node is None:
        return value, 1.0
    mean = graph.constant(graph.take(value, "Sub"), 1)
    node = graph.take(node.output[0], "Mul", "Div")
    factor = graph.constant(node, 1)
    if mean.size != 1 or factor.size != 1 or float(mean.ravel()[0]) != 127.5:
        raise UserError(f"{graph.path}: subtracts {mean.ravel()[:3].tolist()} from the pixels; only 127.5 is known")
    factor = float(factor.ravel()[0])
    return graph.following(node.output[0])[0], 127.5 * (factor if node.op_type == "Mul" else 1 / factor)


def _batch_norm(graph: Graph, value: str, name: str, state: State, bias=None, channels: int | None = None) -> str:
    """Take the batch norm after ``value``; where it was folded away, one that adds ``bias`` takes its place."""
    node = graph.peek(value, "BatchNormalization")
    if node is None:
        if channels is None:
            graph.take(value, "BatchNormalization")
        scale, shift = np.ones(channels, np.float32), np.zeros(channels, np.float32) if bias is None else bias
        mean, variance = np.zeros(channels, np.float32), np.full(channels, 1 - EPSILON, np.float32)
    else:
        graph.visited.add(id(node))
        scale, shift, mean, variance = (graph.constant(node, i) for i in range(1, 5))
        epsilon = graph.attributes(node).get("epsilon", EPSILON)
        if not np.isclose(epsilon, EPSILON, rtol=1e-4, atol=0):
            ratio = np.sqrt((variance.astype(np.float64) + EPSILON) / (variance.astype(np.float64) + epsilon))
            scale = (scale * ratio).astype(np.float32)
        mean = mean if bias is None else mean - bias
        value = node.output[0]
    parts = {"weight": scale, "bias": shift, "running_mean": mean, "running_var": variance}
    state.update({f"{name}.{part}": array.reshape(-1) for part, array in parts.items()})
    return value


def _conv(graph: Graph, node, conv: str, norm: str, state: State) -> str:
    """A convolution (``node``) and its batch norm, folded or not."""
    graph.visited.add(id(node))
    state[f"{conv}.weight"] = graph.constant(node, 1)
    bias = graph.constant(node, 2) if len(node.input) > 2 else None
    return _batch_norm(graph, node.output[0], norm, state, bias, len(state[f"{conv}.weight"]))


def _prelu(graph: Graph, value: str, name: str, state: State) -> str:
    node = graph.take(value, "PRelu")
    state[f"{name}.weight"] = graph.constant(node, 1).reshape(-1)
    return node.output[0]


def _linear(graph: Graph, value: str, name: str, state: State, with_bias: bool) -> tuple[str, np.ndarray | None, int]:
    """Flatten and linear layer; returns (output, bias that has no layer to go to, outputs)."""
    if not with_bias and (node := graph.peek(value, "Conv")) is not None:  # 1x1 on one pixel
        weight = graph.constant(node, 1)
        if weight.shape[2:] != (1, 1) or graph.attributes(node).get("group", 1) != 1:
            raise UserError(f"{graph.path}: Conv {node.name!r} of shape {list(weight.shape)} where 1x1 was expected")
        graph.visited.add(id(node))
        state[f"{name}.weight"] = np.ascontiguousarray(weight[:, :, 0, 0])
        return node.output[0], graph.constant(node, 2) if len(node.input) > 2 else None, len(weight)
    value = _flattened(graph, value)
    node = graph.take(value, "Gemm", "MatMul")
    weight, bias, value = graph.constant(node, 1), None, node.output[0]
    attributes = graph.attributes(node)
    if (attributes.get("alpha", 1.0), attributes.get("beta", 1.0), attributes.get("transA", 0)) != (1.0, 1.0, 0):
        raise UserError(f"{graph.path}: Gemm {node.name!r} with alpha, beta or transA is not known")
    if node.op_type == "Gemm":
        weight = weight if attributes.get("transB", 0) else weight.T
        bias = graph.constant(node, 2) if len(node.input) > 2 else None
    else:
        weight = weight.T
        if (add := graph.peek(value, "Add")) is not None:
            graph.visited.add(id(add))
            bias = graph.constant(add, 1 if add.input[1] in graph.constants else 0)
            value = add.output[0]
    state[f"{name}.weight"] = np.ascontiguousarray(weight)
    if with_bias:
        state[f"{name}.bias"] = np.zeros(len(weight), np.float32) if bias is None else bias.reshape(-1)
        bias = None
    return value, bias, len(weight)


def _walk_iresnet(graph: Graph, value: str, state: State) -> str:
    value = _conv(graph, graph.take(value, "Conv"), "conv1", "bn1", state)
    value = _prelu(graph, value, "prelu", state)
    stage, index = 0, 0
    while graph.peek(value, "Add", "Conv") is not None:
        value, _ = graph.following(value)
        norm, start = graph.take(value, "BatchNormalization"), value
        conv1 = graph.take(norm.output[0], "Conv")
        strided = _second_conv(graph, conv1)
        if graph.attributes(strided).get("strides", [1])[0] > 1 or stage == 0:
            stage, index = stage + 1, 0
        block = f"layer{stage}.{index}"
        _batch_norm(graph, start, f"{block}.bn1", state)
        value = _conv(graph, conv1, f"{block}.conv1", f"{block}.bn2", state)
        value = _prelu(graph, value, f"{block}.prelu", state)
        value = _conv(graph, graph.take(value, "Conv"), f"{block}.conv2", f"{block}.bn3", state)
        add = graph.take(value, "Add")
        shortcut = graph.peek(start, "Conv")
        if shortcut is not None:
            _conv(graph, shortcut, f"{block}.downsample.0", f"{block}.downsample.1", state)
        value, index = add.output[0], index + 1
    value = _batch_norm(graph, value, "bn2", state)
    value, _, channels = _linear(graph, value, "fc", state, with_bias=True)
    return _batch_norm(graph, value, "features", state, channels=channels)


def _second_conv(graph: Graph, conv1):
    """The second convolution of the block that ``conv1`` begins, without walking there."""
    value = conv1.output[0]
    norm = graph.peek(value, "BatchNormalization")
    return graph.take(graph.take(norm.output[0] if norm is not None else value, "PRelu").output[0], "Conv")


def _walk_mobilefacenet(graph: Graph, value: str, state: State) -> str:
    position, residuals, pending = 0, 0, []  # ``pending``: convolutions since the last bottleneck ended
    while True:
        start, scratch = value, {}
        pending.append(graph.take(value, "Conv"))
        value = _conv(graph, pending[-1], "c", "n", scratch)
        if graph.peek(value, "PRelu"):
            value = graph.take(value, "PRelu").output[0]
            continue
        if graph.peek(value, *SHAPES, "Gemm", "MatMul") or _covers_the_map(graph, pending[-1]):
            break
        if position == 0 and len(pending) == 2:  # a first stage without activation
            _first_stage(graph, pending, state)
            pending, position = [], 2
            continue
        alone, bottleneck, pending = pending[:-3], pending[-3:], []
        if position == 0 and len(alone) == 2:
            _first_stage(graph, alone, state)
            alone, position = [], 2
        add = graph.peek(value, "Add")
        if add is not None and bottleneck[0].input[0] not in add.input:
            add = None  # the sum at the end of the next bottleneck, which starts here
        if residuals and (alone or add is None):
            position, residuals = position + 1, 0
        for node in alone:
            _conv_prelu(graph, node, f"layers.{position}", state)
            position += 1
        prefix = f"layers.{position}"
        if add is not None:
            prefix += f".layers.{residuals}"
            residuals += 1
            value = graph.take(value, "Add").output[0]
        for number, node in enumerate(bottleneck):
            _conv_prelu(graph, node, f"{prefix}.layers.{number}", state)
        if add is None:
            position += 1
    if len(pending) != 2:
        raise UserError(f"{graph.path}: {len(pending)} convolutions before the embedding {start!r}; 2 expected")
    _conv_prelu(graph, pending[0], "conv_sep", state)
    value = _conv_prelu(graph, pending[1], "features.layers.0", state)
    value, bias, channels = _linear(graph, value, "features.layers.2", state, with_bias=False)
    return _batch_norm(graph, _flattened(graph, value), "features.layers.3", state, bias, channels)


def _covers_the_map(graph: Graph, node) -> bool:
    """A depthwise convolution that leaves one pixel: no padding, where those before it have some."""
    attributes, weight = graph.attributes(node), graph.constant(node, 1)
    depthwise = attributes.get("group", 1) == len(weight) and weight.shape[1] == 1
    return depthwise and weight.shape[-1] > 1 and not any(attributes.get("pads", [0]))


def _conv_prelu(graph: Graph, node, name: str, state: State) -> str:
    """A layer of a MobileFaceNet: a convolution (``node``), its batch norm, an activation if there is one."""
    after = _conv(graph, node, f"{name}.layers.0", f"{name}.layers.1", state)
    return _prelu(graph, after, f"{name}.layers.2", state) if graph.peek(after, "PRelu") else after


def _first_stage(graph: Graph, nodes: list, state: State) -> None:
    """Store stem and first stage: one or two channels a group; without an activation it gets one of slope 1."""
    for number, node in enumerate(nodes):
        _conv_prelu(graph, node, f"layers.{number}", state)
    shape = state["layers.1.layers.0.weight"].shape
    state.setdefault("layers.1.layers.2.weight", np.ones(shape[0], np.float32))
    if shape[1] not in (1, 2) or shape[2:] != (3, 3):
        told = f"Conv {nodes[1].name!r} of shape {list(shape)} as the first stage of a MobileFaceNet"
        raise UserError(f"{graph.path}: {told}; known are 3x3 with one or two channels a group")


def _flattened(graph: Graph, value: str) -> str:
    """Behind the nodes that only change the shape of an embedding, [B, D, 1, 1] say."""
    while graph.peek(value, *SHAPES) is not None:
        value = graph.take(value, *SHAPES).output[0]
    return value
