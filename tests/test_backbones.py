"""Backbones against PyTorch twins: outputs, gradients, running statistics, counts, options (traps 25-31 and 62)."""

import copy

import numpy as np
import paddle
import pytest

from backbones import ALIASES, BACKBONES, available_options, build_backbone, count_parameters
from backbones.cpu_prelu import CPUPReLU
from utils.compat import paddle_version

torch = pytest.importorskip("torch")
twins = pytest.importorskip("tests.torch_twins")

# Small widths; sizes that halve evenly and ones that do not.
SMALL = {
    "iresnet18": {"width": 4, "input_size": 24, "embedding_size": 8},
    "iresnet34": {"width": 4, "input_size": 20, "embedding_size": 8},
    "mobilefacenet": {"width": 8, "input_size": 40, "embedding_size": 8},
    "mobilefacenet_large": {"width": 8, "input_size": 32, "embedding_size": 8},
    "vit_t": {"width": 16, "input_size": 29, "embedding_size": 8},
    "resnet18": {"width": 4, "input_size": 48, "embedding_size": 8},
    "resnet50": {"width": 4, "input_size": 48, "embedding_size": 8, "se": True, "pool": "flatten"},
    "resnet34": {"width": 4, "input_size": 24, "stem": "face", "pool": "flatten", "in_channels": 1},
    "resnet_face18": {"width": 16, "input_size": 32, "embedding_size": 8},
    "mnist_2d": {"width": 4},
}
NO_CHANCE = {"vit_t": {"drop_path": 0.0, "mask_ratio": 0.0}, "resnet_face18": {"dropout": 0.0}}
COUNTS = {
    "iresnet18": 24_025_600,
    "iresnet34": 34_139_328,
    "iresnet50": 43_590_848,
    "iresnet100": 65_156_160,
    "iresnet200": 118_833_920,
}


@pytest.fixture
def float64():
    paddle.set_default_dtype("float64")
    yield
    paddle.set_default_dtype("float32")


def make_pair(name, dtype="float64", **more):
    options = {**SMALL[name], **more}
    ours = twins.randomise(build_backbone(name, **options, **NO_CHANCE.get(name, {})))
    twin = twins.build_twin(name, **options).to(getattr(torch, dtype))
    twins.copy_weights(ours, twin)
    size = options.get("input_size", 28)
    channels = 1 if getattr(ours, "in_channels", 3) == 1 else 3
    rng = np.random.default_rng(1)
    image = rng.standard_normal([6, channels, size, size]).astype(dtype)
    cotangent = rng.standard_normal([6, ours.embedding_size]).astype(dtype)
    return ours, twin, image, cotangent


def gradients(ours):
    """Gradients by PyTorch's names and layout."""
    transposed = twins.linear_names(ours)
    return {
        twins.twin_name(n): (p.grad.numpy().T if n in transposed else p.grad.numpy())
        for n, p in ours.named_parameters()
        if p.grad is not None
    }


def backward(layer, image, cotangent):
    image = paddle.to_tensor(image, stop_gradient=False)
    output = layer(image)
    (output * paddle.to_tensor(cotangent)).sum().backward()
    return output.numpy(), image.grad.numpy()


@pytest.mark.oldest
@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("training", [True, False])
def test_float64_equals_torch(name, training, float64):
    """Outputs, gradients of every weight and of the image to 1e-8; statistics after the step (traps 25, 26, 29)."""
    ours, twin, image, cotangent = make_pair(name)
    before = {twins.twin_name(n): v.numpy().copy() for n, v in ours.state_dict().items()}
    ours.train() if training else ours.eval()
    twin.train(training)
    counts = count_values(twin)
    output, image_grad = backward(ours, image, cotangent)
    twin_image = torch.tensor(image, requires_grad=True)
    twin_output = twin(twin_image)
    (twin_output * torch.tensor(cotangent)).sum().backward()
    scale = 1 + np.abs(twin_output.detach().numpy()).max()
    np.testing.assert_allclose(output, twin_output.detach().numpy(), rtol=1e-8, atol=1e-8 * scale)
    grads = gradients(ours)
    expected = {n: p.grad.numpy() for n, p in twin.named_parameters() if p.grad is not None}
    assert set(grads) == set(expected)
    top = max(np.abs(value).max() for value in expected.values())
    for key, value in expected.items():
        np.testing.assert_allclose(grads[key], value, rtol=1e-7, atol=1e-8 * max(1.0, top), err_msg=key)
    np.testing.assert_allclose(image_grad, twin_image.grad.numpy(), rtol=1e-7, atol=1e-8 * max(1.0, top))
    check_statistics(ours, twin, before, counts, training)


def count_values(twin):
    """Fills a dict with n, the values per channel that each batch norm saw."""
    counts = {}

    def remember(name):
        def hook(part, inputs, output):
            counts[name] = inputs[0].numel() // inputs[0].shape[1]

        return hook

    for name, part in twin.named_modules():
        if isinstance(part, torch.nn.BatchNorm2d | torch.nn.BatchNorm1d):
            part.register_forward_hook(remember(name))
    return counts


def check_statistics(ours, twin, before, counts, training):
    """Equal, but for PyTorch's factor n/(n-1) on the batch's part of the variance.

    To 1e-6, not 1e-8: Paddle's kernel holds the momentum 0.9 in float32.
    """
    after = twin.state_dict()
    for name, value in ours.state_dict().items():
        key = twins.twin_name(name)
        if not key.endswith(("running_mean", "running_var")):
            continue
        expected = after[key].numpy()
        if key.endswith("running_var") and training:
            n = counts[key.rsplit(".", 1)[0]]
            expected = 0.9 * before[key] + (expected - 0.9 * before[key]) * (n - 1) / n
        np.testing.assert_allclose(value.numpy(), expected, rtol=1e-6, atol=1e-7, err_msg=key)
        assert (np.abs(value.numpy() - before[key]).max() > 0) == training, key


@pytest.mark.parametrize("name", SMALL)
def test_float32_output_equals_torch(name):
    ours, twin, image, _ = make_pair(name, "float32")
    ours.eval()
    with paddle.no_grad(), torch.no_grad():
        expected = twin.eval()(torch.tensor(image)).numpy()
        atol = 1e-4 * max(1.0, np.abs(expected).max())
        np.testing.assert_allclose(ours(paddle.to_tensor(image)).numpy(), expected, rtol=1e-4, atol=atol)


@pytest.mark.parametrize("name", ["iresnet18", "mobilefacenet", pytest.param("vit_t", marks=pytest.mark.slow)])
def test_real_size_equals_torch(name):
    """Full width at 112x112: shapes, counts and the checkpoints' names (a strict load) at once; 1e-4."""
    ours = twins.randomise(build_backbone(name))
    twin = twins.build_twin(name)
    twins.copy_weights(ours, twin)
    assert count_parameters(ours) == sum(p.numel() for p in twin.parameters())
    image = np.random.default_rng(2).standard_normal([2, 3, 112, 112]).astype("float32")
    ours.eval()
    with paddle.no_grad(), torch.no_grad():
        expected = twin.eval()(torch.tensor(image)).numpy()
        actual = ours(paddle.to_tensor(image)).numpy()
    assert actual.shape == (2, 512)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4 * max(1.0, np.abs(expected).max()))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["iresnet34", "iresnet50", "iresnet100", "iresnet200", "mobilefacenet_large",
                                  "vit_s", "vit_b", "vit_l"])  # fmt: skip
def test_large_sizes_equal_torch(name):
    test_real_size_equals_torch(name)


@pytest.mark.parametrize("name", ["iresnet18", pytest.param("iresnet34", marks=pytest.mark.slow),
                                  "iresnet50", pytest.param("iresnet100", marks=pytest.mark.slow),
                                  pytest.param("iresnet200", marks=pytest.mark.slow)])  # fmt: skip
def test_published_counts(name):
    assert count_parameters(build_backbone(name)) == COUNTS[name]


def test_narrow_counts_follow_from_the_definition():
    """Every iresnet by arithmetic alone: convolutions, two values a BN channel, one a PReLU channel, fc, last BN."""
    for name, depths in twins.DEPTHS.items():
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
        assert count_parameters(build_backbone(name, width=width, input_size=32, embedding_size=dim)) == total


@pytest.mark.oldest
def test_last_scale_stays_one():
    """Trap 26: not trained, not decayed."""
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


@pytest.mark.parametrize("name", ["iresnet18", "mobilefacenet", "vit_t", "resnet18", "resnet50", "resnet_face18",
                                  "mnist_2d"])  # fmt: skip
def test_nhwc_equals_nchw(name, float64):
    """One state dict serves both layouts."""
    ours, _, image, cotangent = make_pair(name)
    other = build_backbone(name, **{**SMALL[name], **NO_CHANCE.get(name, {})}, data_format="NHWC")
    other.set_state_dict(ours.state_dict())
    output, image_grad = backward(ours, image, cotangent)
    output2, image_grad2 = backward(other, image, cotangent)
    np.testing.assert_allclose(output2, output, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(image_grad2, image_grad, rtol=1e-8, atol=1e-9)
    first, second = gradients(ours), gradients(other)
    for key in first:
        np.testing.assert_allclose(second[key], first[key], rtol=1e-8, atol=1e-8, err_msg=key)


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.25, 0.5, 0.75])
def test_vit_masks_its_ratio(ratio):
    """Trap 62: in training the blocks see int(L * (1 - ratio)) tokens, other ones for every sample; in eval all."""
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


def test_vit_masked_forward_equals_torch(float64):
    """The unshuffle puts every token back to its place and the mask token into the gaps."""
    ours, twin, image, cotangent = make_pair("vit_t")
    ours.num_kept = 5
    seen = []
    ours.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].numpy()))
    output, _ = backward(ours, image, cotangent)
    with torch.no_grad():
        tokens = twin.patch_embed.proj(torch.tensor(image)).flatten(2).transpose(1, 2) + twin.pos_embed
    distance = np.abs(seen[0][:, :, None] - tokens.numpy()[:, None]).max(axis=3)
    twin.train()
    twin_output = twin(torch.tensor(image), keep=torch.tensor(distance.argmin(axis=2)))
    (twin_output * torch.tensor(cotangent)).sum().backward()
    np.testing.assert_allclose(output, twin_output.detach().numpy(), rtol=1e-8, atol=1e-8)
    grads = gradients(ours)
    for key, parameter in twin.named_parameters():
        np.testing.assert_allclose(grads[key], parameter.grad.numpy(), rtol=1e-7, atol=1e-8, err_msg=key)


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
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("shape", "num"), [((3, 5, 4, 7), 5), ((2, 6, 3, 3), 1), ((2, 3, 200, 300), 3)])
def test_cpu_prelu_equals_torch(dtype, shape, num):
    """Signed zeros, denormals, infinities and slopes of any size included."""
    rng = np.random.default_rng(5)
    x, weight, cotangent = rng.standard_normal(shape), rng.normal(0, 2, num), rng.standard_normal(shape)
    x.reshape(-1)[:5] = [0.0, -0.0, 1e-42, -1e-42, np.inf]
    x, weight, cotangent = x.astype(dtype), weight.astype(dtype), cotangent.astype(dtype)
    ours = [paddle.to_tensor(value, stop_gradient=False) for value in (x, weight)]
    theirs = [torch.tensor(value, requires_grad=True) for value in (x, weight)]
    output, expected = CPUPReLU.apply(*ours), torch.nn.functional.prelu(*theirs)
    output.backward(paddle.to_tensor(cotangent))
    expected.backward(torch.tensor(cotangent))
    np.testing.assert_array_equal(output.numpy(), expected.detach().numpy())
    np.testing.assert_array_equal(ours[0].grad.numpy(), theirs[0].grad.numpy())
    tolerance = 1e-4 if dtype == "float32" else 1e-10
    np.testing.assert_allclose(ours[1].grad.numpy(), theirs[1].grad.numpy(), rtol=tolerance, atol=tolerance)
    np.testing.assert_array_equal(ours[0].numpy(), x)


def test_frozen_stages_get_no_gradient():
    """Fine-tuning: part of the network frozen, the rest equal to what it is without freezing."""
    ours, _, image, cotangent = make_pair("iresnet18", "float32")
    backward(ours, image, cotangent)
    expected = gradients(ours)
    ours, _, image, cotangent = make_pair("iresnet18", "float32")
    for parameter in [*ours.conv1.parameters(), *ours.prelu.parameters(), *ours.layer1.parameters()]:
        parameter.stop_gradient = True
    (ours(paddle.to_tensor(image)) * paddle.to_tensor(cotangent)).sum().backward()
    frozen = gradients(ours)
    assert not any(key.startswith(("conv1", "prelu", "layer1")) for key in frozen)
    np.testing.assert_allclose(frozen["layer4.1.conv2.weight"], expected["layer4.1.conv2.weight"], rtol=1e-4, atol=1e-5)


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


@pytest.mark.parametrize("name", ["resnet34", "resnet_face18", "mnist_2d"])
def test_grey_networks_take_rgb(name):
    """RGB becomes luma; a grey picture in three equal channels gives what one channel gives."""
    ours, _, image, _ = make_pair(name, "float32")
    ours.eval()
    three = paddle.to_tensor(np.repeat(image, 3, axis=1))
    np.testing.assert_allclose(ours(three).numpy(), ours(paddle.to_tensor(image)).numpy(), rtol=1e-3, atol=1e-4)


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


compiles = pytest.mark.skipif(paddle_version() < (3, 0), reason="compiled convolutions need Paddle 3")


@compiles
@pytest.mark.parametrize("name", ["iresnet18", "mobilefacenet", "resnet_face18", "mnist_2d", "vit_t"])
def test_compiled_equals_dynamic(name):
    """``run.compile``: outputs, gradients and statistics of a step to float32 rounding; other batches; deep copies."""
    from utils.compile import compile_backbone

    ours, _, image, cotangent = make_pair(name, "float32")
    plain = copy.deepcopy(ours)
    assert compile_backbone(ours) is ours
    assert list(ours.state_dict()) == list(plain.state_dict())
    for batch in (6, 6, 4):
        output, image_grad = backward(ours, image[:batch], cotangent[:batch])
        expected, expected_image_grad = backward(plain, image[:batch], cotangent[:batch])
        np.testing.assert_allclose(output, expected, rtol=1e-3, atol=1e-4)
        close(image_grad, expected_image_grad)
        first, second = gradients(ours), gradients(plain)
        assert set(first) == set(second)
        close(np.concatenate([first[k].ravel() for k in second]), np.concatenate([v.ravel() for v in second.values()]))
        ours.clear_gradients()
        plain.clear_gradients()
    for key, value in plain.state_dict().items():
        np.testing.assert_allclose(ours.state_dict()[key].numpy(), value.numpy(), rtol=1e-3, atol=1e-4, err_msg=key)
    other = copy.deepcopy(ours).eval()
    ours.eval()
    with paddle.no_grad():
        before = ours(paddle.to_tensor(image)).numpy()
        for parameter in other.parameters():
            parameter.set_value(parameter * 0.5)
        np.testing.assert_array_equal(ours(paddle.to_tensor(image)).numpy(), before)
        assert np.abs(other(paddle.to_tensor(image)).numpy() - before).max() > 1e-3


def close(actual, expected):
    """Equal to float32 rounding, which batch norms over few values magnify: relative to the whole vector."""
    assert np.linalg.norm(actual - expected) < 1e-3 * np.linalg.norm(expected)


@compiles
def test_compile_refuses_recompute():
    from utils.compile import compile_backbone
    from utils.errors import UserError

    with pytest.raises(UserError, match="recompute"):
        compile_backbone(build_backbone("r18", width=2, input_size=16, recompute=True))


def test_freed_memory_is_kept():
    """Page faults of a large operation, counted by the kernel, all but vanish; run apart, for it cannot be undone."""
    import subprocess
    import sys
    from pathlib import Path

    source = """
import resource, sys
sys.path.insert(0, sys.argv[1])
import numpy as np
from utils.malloc import keep_freed_memory
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
