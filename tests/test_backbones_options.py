"""Backbones without a second framework: registry, options, initial weights, recompute, masking, the CPU's PReLU."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import paddle
import pytest

from backbones import ALIASES, BACKBONES, available_options, build_backbone
from backbones.cpu_prelu import CPUPReLU
from backbones.layers import SMALL as SMALL_ACTIVATION
from backbones.layers import PReLU, batch_norm, batch_norm_1d, conv
from utils.errors import UserError
from utils.model.compile import compile_backbone
from utils.run.summary import count_parameters

# Small widths; sizes that halve evenly and ones that do not.
SMALL = {
    "iresnet18": {"width": 4, "input_size": 24, "embedding_size": 8},
    "mobilefacenet": {"width": 8, "input_size": 40, "embedding_size": 8},
    "vit_t": {"width": 16, "input_size": 29, "embedding_size": 8},
    "resnet18": {"width": 4, "input_size": 48, "embedding_size": 8},
    "resnet_face18": {"width": 16, "input_size": 32, "embedding_size": 8},
    "mnist_2d": {"width": 4},
}
DEPTHS = {
    "iresnet18": (2, 2, 2, 2),
    "iresnet34": (3, 4, 6, 3),
    "iresnet50": (3, 4, 14, 3),
    "iresnet100": (3, 13, 30, 3),
    "iresnet200": (6, 26, 60, 6),
}


@pytest.fixture
def float64():
    paddle.set_default_dtype("float64")
    yield
    paddle.set_default_dtype("float32")


def gradients(layer):
    return {name: p.grad.numpy() for name, p in layer.named_parameters() if p.grad is not None}


def backward(layer, image, cotangent):
    image = paddle.to_tensor(image, stop_gradient=False)
    output = layer(image)
    (output * paddle.to_tensor(cotangent)).sum().backward()
    return output.numpy(), image.grad.numpy()


def test_narrow_counts_follow_from_the_definition():
    """Every iresnet by arithmetic alone: convolutions, two values a BN channel, one a PReLU channel, fc, last BN."""
    for name, depths in DEPTHS.items():
        width, size, dim = 2, 2, 4
        total = 27 * width + 2 * width + width
        cin = width
        for stage, depth in enumerate(depths):
            cout = width * 2**stage
            for index in range(depth):
                c = cin if index == 0 else cout
                total += 2 * c + 9 * c * cout + 2 * cout + cout + 9 * cout * cout + 2 * cout
                total += (c * cout + 2 * cout) if index == 0 else 0
            cin = cout
        total += 2 * cin + cin * size * size * dim + dim + 2 * dim
        assert count_parameters(build_backbone(name, width=width, input_size=32, embedding_size=dim))[0] == total


@pytest.mark.oldest
def test_last_scale_stays_one():
    """Not trained, not decayed."""
    paddle.seed(0)
    layer = build_backbone("r18", width=4, input_size=16, embedding_size=8)
    trained = [p for p in layer.parameters() if not p.stop_gradient]
    optimizer = paddle.optimizer.Momentum(0.1, 0.9, parameters=layer.parameters(), weight_decay=0.1)
    first = layer.fc.weight.numpy().copy()
    for _ in range(2):
        layer(paddle.randn([4, 3, 16, 16])).square().sum().backward()
        optimizer.step()
        optimizer.clear_grad()
    assert all(p is not layer.features.weight for p in trained)
    np.testing.assert_array_equal(layer.features.weight.numpy(), np.ones(8))
    assert np.abs(layer.fc.weight.numpy() - first).max() > 0
    assert np.abs(layer.features.bias.numpy()).max() > 0


def test_initial_weights():
    """Convolutions N(0, 0.1); linear uniform within 1/sqrt(fan in); PReLU 0.25; norms 1 and 0."""
    paddle.seed(0)
    layer = build_backbone("iresnet18", width=32, input_size=32)
    weight = layer.layer4[1].conv2.weight.numpy()
    assert abs(weight.std() - 0.1) < 2e-3 and abs(weight.mean()) < 1e-3
    bound = layer.fc.weight.shape[0] ** -0.5
    assert 0.95 * bound < np.abs(layer.fc.weight.numpy()).max() <= bound
    assert (layer.prelu.weight.numpy() == 0.25).all()
    assert (layer.bn1.weight.numpy() == 1).all() and (layer.bn1.bias.numpy() == 0).all()


@pytest.mark.oldest
@pytest.mark.parametrize("name", ["iresnet18", "mobilefacenet", "vit_t", "resnet18", "resnet_face18", "mnist_2d"])
def test_recompute_changes_nothing(name, float64):
    """Outputs, gradients and running statistics of a step, stochastic depth and masking included."""
    paddle.seed(3)
    options = {**SMALL[name], **({"drop_path": 0.5, "mask_ratio": 0.3} if name == "vit_t" else {})}
    plain = build_backbone(name, **options)
    thrifty = build_backbone(name, **options, recompute=True)
    thrifty.set_state_dict(plain.state_dict())
    size = options.get("input_size", 28)
    rng = np.random.default_rng(6)
    image, cotangent = rng.standard_normal([6, 3, size, size]), rng.standard_normal([6, plain.embedding_size])
    results = []
    for layer in (plain, thrifty):
        paddle.seed(4)
        output, image_grad = backward(layer, image, cotangent)
        results.append((output, image_grad, gradients(layer), {k: v.numpy() for k, v in layer.state_dict().items()}))
        results[-1] += (paddle.rand([3]).numpy(),)
    (output, image_grad, grads, state, draw), (output2, image_grad2, grads2, state2, draw2) = results
    np.testing.assert_allclose(output2, output, rtol=0, atol=1e-12)
    np.testing.assert_allclose(image_grad2, image_grad, rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(draw2, draw)  # later random numbers do not shift either
    assert set(grads) == set(grads2)
    for key in grads:
        np.testing.assert_allclose(grads2[key], grads[key], rtol=1e-12, atol=1e-12, err_msg=key)
    for key in state:
        np.testing.assert_array_equal(state2[key], state[key], err_msg=key)


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.25, 0.5, 0.75])
def test_vit_masks_its_ratio(ratio):
    """In training the blocks see int(L * (1 - ratio)) tokens, other ones for every sample; in eval all."""
    layer = build_backbone("vit_t", width=16, mask_ratio=ratio, drop_path=0.0)
    seen = []
    layer.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].numpy()))
    image = paddle.randn([3, 3, 112, 112])
    layer(image)
    layer.eval()
    layer(image)
    kept, every = seen
    assert every.shape[1] == 144 and kept.shape[1] == int(144 * (1 - ratio))
    chosen = []
    for sample, full in zip(kept, every, strict=True):
        index = [int(np.flatnonzero((full == token).all(axis=1))[0]) for token in sample]
        assert len(set(index)) == len(index)
        chosen.append(frozenset(index))
    assert len(set(chosen)) == (1 if ratio == 0 else 3)


def test_vit_stochastic_depth():
    """A dropped branch is dropped for the whole sample, a kept one is scaled by 1 / (1 - p); eval keeps all."""
    layer = build_backbone("vit_t", width=16, drop_path=0.4)
    rates = [block.drop_path.probability for block in layer.blocks]
    np.testing.assert_allclose(rates, np.linspace(0, 0.4, 12))
    drop = layer.blocks[-1].drop_path
    paddle.seed(0)
    value = drop(paddle.ones([4000, 2, 3])).numpy()
    assert set(np.unique(value.round(5))) == {0.0, np.float32(1 / 0.6).round(5)}
    assert (value == value[:, :1, :1]).all() and abs(value.mean() - 1) < 0.05
    drop.eval()
    assert (drop(paddle.ones([5, 2, 3])).numpy() == 1).all()


@pytest.mark.oldest
def test_registry():
    """Names, aliases, nearest name, unknown options, None for the default."""
    assert set(ALIASES.values()) <= set(BACKBONES)
    for alias in ("r18", "r34", "r50", "r100", "r200", "mbf"):
        assert alias in ALIASES
    with pytest.raises(ValueError, match=r"'iresnet51'.*'iresnet50'"):
        build_backbone("iresnet51")
    with pytest.raises(ValueError, match="'widht'"):
        build_backbone("r18", widht=3)
    with pytest.raises(ValueError, match="NCWH"):
        build_backbone("r18", width=2, data_format="NCWH")
    with pytest.raises(ValueError, match="mask_ratio 1"):
        build_backbone("vit_t", width=16, mask_ratio=1.0)
    with pytest.raises(ValueError, match="pool 'max'"):
        build_backbone("resnet18", pool="max")
    assert "depths" not in available_options("r18")
    assert build_backbone("mnist_2d", width=None, embedding_size=3).embedding_size == 3


def test_dropout_is_where_the_definition_has_it():
    """Between flatten and linear, in training only, kept values scaled up."""
    layer = build_backbone("r18", width=4, input_size=16, embedding_size=8, dropout=0.5)
    seen = []
    layer.fc.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].numpy()))
    layer(paddle.randn([64, 3, 16, 16]))
    assert abs((seen[0] == 0).mean() - 0.5) < 0.1
    layer.eval()
    layer(paddle.randn([4, 3, 16, 16]))
    assert (seen[1] != 0).mean() > 0.99


def test_compile_refuses_recompute():

    with pytest.raises(UserError, match="recompute"):
        compile_backbone(build_backbone("r18", width=2, input_size=16, recompute=True))


def test_freed_memory_is_kept():
    """Page faults of a large operation, counted by the kernel, all but vanish; run apart, for it cannot be undone."""
    source = """
import resource, sys
sys.path.insert(0, sys.argv[1])
import numpy as np
from utils.system import keep_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        np.ones(8_000_000, np.float32)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
fresh = faults()
done = keep_freed_memory()
faults()
print(done, fresh, faults())
"""
    root = str(Path(__file__).resolve().parent.parent)
    run = subprocess.run([sys.executable, "-c", source, root], capture_output=True, text=True, check=True)
    done, fresh, kept = run.stdout.split()
    if done == "True":
        assert int(kept) * 5 < int(fresh)


@pytest.mark.oldest
@pytest.mark.parametrize("num", [1, 6])
def test_cpu_prelu_by_definition(num):
    """Value and both gradients against numpy, in float64."""
    rng = np.random.default_rng(7)
    x, cotangent, weight = rng.standard_normal([2, 6, 3, 5]), rng.standard_normal([2, 6, 3, 5]), rng.normal(0, 1, num)
    tensors = [paddle.to_tensor(value, stop_gradient=False) for value in (x, weight)]
    output = CPUPReLU.apply(*tensors)
    output.backward(paddle.to_tensor(cotangent))
    slope = np.broadcast_to(weight, 6)[:, None, None]
    np.testing.assert_allclose(output.numpy(), np.where(x > 0, x, slope * x), rtol=1e-12)
    np.testing.assert_allclose(tensors[0].grad.numpy(), np.where(x > 0, 1, slope) * cotangent, rtol=1e-12)
    by_channel = (np.minimum(x, 0) * cotangent).sum((0, 2, 3))
    expected = by_channel if num == 6 else by_channel.sum(keepdims=True)
    np.testing.assert_allclose(tensors[1].grad.numpy(), expected, rtol=1e-10)


@pytest.mark.oldest
@pytest.mark.parametrize("data_format", ["NCHW", "NHWC"])
@pytest.mark.parametrize("groups", [1, 6])
@pytest.mark.parametrize("training", [True, False])
def test_layers_that_call_their_kernels_are_paddle_s(data_format, groups, training, float64):
    """Convolution, dense or depthwise, and batch norm: values, gradients and running statistics of Paddle's own."""
    if data_format == "NHWC" and groups > 1:
        pytest.skip("Paddle's CPU kernel has no depthwise convolution in this layout")
    ours = paddle.nn.Sequential(conv(6, 6, 3, 2, groups=groups, data_format=data_format), batch_norm(6, data_format))
    options = {"groups": groups, "bias_attr": False, "data_format": data_format}
    plain = paddle.nn.Sequential(
        paddle.nn.Conv2D(6, 6, 3, 2, 1, **options), paddle.nn.BatchNorm2D(6, data_format=data_format)
    )
    plain.set_state_dict(ours.state_dict())
    rng = np.random.default_rng(10)
    image = rng.standard_normal([2, 6, 9, 9] if data_format == "NCHW" else [2, 9, 9, 6])
    cotangent = rng.standard_normal([2, 6, 5, 5] if data_format == "NCHW" else [2, 5, 5, 6])
    results = []
    for network in (ours, plain):
        network.train() if training else network.eval()
        output, image_grad = backward(network, image, cotangent)
        grads = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
        results.append([np.asarray(each) for each in (output, image_grad, *grads, *network.state_dict().values())])
    for found, expected in zip(*results, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-14)
    moved = np.abs(np.asarray(ours[1]._mean)).max() > 0
    assert moved == training


@pytest.mark.oldest
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["iresnet18", "mobilefacenet"])
def test_a_backbone_becomes_one_program(name, training):
    """What the accelerators' ``run.compile``, the exports and Paddle's inference do with the layers' own forwards."""
    network = build_backbone(name, **SMALL[name])
    network.train() if training else network.eval()
    size = SMALL[name]["input_size"]
    image = paddle.to_tensor(np.random.default_rng(12).standard_normal([4, 3, size, size], dtype=np.float32))
    expected = network(image).numpy()
    spec = [paddle.static.InputSpec([None, 3, size, size], "float32")]
    flag = "FLAGS_use_mkldnn"  # on in a process that compiled for the CPU, where whole networks are not compiled
    before = paddle.get_flags([flag])
    paddle.set_flags({flag: False})
    try:
        program = paddle.jit.to_static(network.forward, input_spec=spec, full_graph=True)
        np.testing.assert_allclose(program(image).numpy(), expected, rtol=1e-4, atol=1e-4)
    finally:
        paddle.set_flags(before)


@pytest.mark.parametrize("size", [4, 96])
def test_prelu_is_the_same_below_and_above_the_size_that_changes_kernels(size, float64):
    rng = np.random.default_rng(11)
    layer, shape = PReLU(6), [1, 6, size, size]
    assert (np.prod(shape) >= SMALL_ACTIVATION) == (size == 96)
    x, cotangent = rng.standard_normal(shape), rng.standard_normal(shape)
    output, x_grad = backward(layer, x, cotangent)
    np.testing.assert_allclose(output, np.where(x > 0, x, 0.25 * x), rtol=1e-12)
    np.testing.assert_allclose(x_grad, np.where(x > 0, 1, 0.25) * cotangent, rtol=1e-12)
    np.testing.assert_allclose(layer.weight.grad.numpy(), (np.minimum(x, 0) * cotangent).sum((0, 2, 3)), rtol=1e-10)


@pytest.mark.oldest
@pytest.mark.parametrize("training", [True, False])
def test_frozen_scale_leaves_the_shift_trainable(training, float64):
    """Paddle's own batch norm gives no gradient to the shift once the scale is frozen; ours: the cotangent's sum."""
    layer = batch_norm_1d(4, frozen_scale=True)
    layer.train() if training else layer.eval()
    cotangent = np.random.default_rng(8).standard_normal([6, 4])
    _, image_grad = backward(layer, np.random.default_rng(9).standard_normal([6, 4]), cotangent)
    assert layer.weight.grad is None
    np.testing.assert_allclose(layer.bias.grad.numpy(), cotangent.sum(0), rtol=1e-12)
    if training:  # the normalised values do not change with their mean
        np.testing.assert_allclose(image_grad.sum(0), 0, atol=1e-12)
