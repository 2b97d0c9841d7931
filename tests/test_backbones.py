"""Backbones against PyTorch twins: outputs, gradients, running statistics, counts, options."""

import copy

import numpy as np
import paddle
import pytest

from backbones import build_backbone
from backbones.cpu_prelu import CPUPReLU
from utils.compat import paddle_version
from utils.run.summary import count_parameters

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


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("training", [True, False])
def test_float64_equals_torch(name, training, float64):
    """Outputs, gradients of every weight and of the image to 1e-8; statistics after the step."""
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
    assert count_parameters(ours)[0] == sum(p.numel() for p in twin.parameters())
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
    assert count_parameters(build_backbone(name))[0] == COUNTS[name]


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


@pytest.mark.parametrize("name", ["resnet34", "resnet_face18", "mnist_2d"])
def test_grey_networks_take_rgb(name):
    """RGB becomes luma; a grey picture in three equal channels gives what one channel gives."""
    ours, _, image, _ = make_pair(name, "float32")
    ours.eval()
    three = paddle.to_tensor(np.repeat(image, 3, axis=1))
    np.testing.assert_allclose(ours(three).numpy(), ours(paddle.to_tensor(image)).numpy(), rtol=1e-3, atol=1e-4)


compiles = pytest.mark.skipif(paddle_version() < (3, 0), reason="compiled convolutions need Paddle 3")


@compiles
@pytest.mark.parametrize("name", ["iresnet18", "mobilefacenet", "resnet_face18", "mnist_2d", "vit_t"])
def test_compiled_equals_dynamic(name):
    """``run.compile``: outputs, gradients and statistics of a step to float32 rounding; other batches; deep copies."""
    from utils.model.compile import compile_backbone

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
