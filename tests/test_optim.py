"""Optimisers, clipping, loss scale, averages: against float64 numpy and PyTorch."""

import math

import numpy as np
import paddle
import pytest

from utils.errors import UserError
from utils.model.ema import Ema
from utils.model.optimizer import BackboneOptimizer, clip_coefficient, gradient_norm, is_norm_or_bias, trainable
from utils.model.precision import LossScaler, check_precision
from utils.system import without_machine_code

pytestmark = pytest.mark.oldest


class Net(paddle.nn.Layer):
    def __init__(self, dtype="float64"):
        super().__init__()
        paddle.set_default_dtype(dtype)
        self.fc = paddle.nn.Linear(4, 3)
        self.bn = paddle.nn.BatchNorm1D(3)
        paddle.set_default_dtype("float32")

    def forward(self, x):
        return self.bn(self.fc(x))


def run_ours(gradients, options, lrs, coefficients, start):
    net = Net()
    parameters = trainable(net)
    for name, parameter in parameters.items():
        parameter.set_value(start[name])
    optimizer = BackboneOptimizer(parameters, **options)
    for gradient, lr, coefficient in zip(gradients, lrs, coefficients, strict=True):
        for name, parameter in parameters.items():
            parameter.grad = paddle.to_tensor(gradient[name])
        optimizer.step(lr, coefficient)
        optimizer.clear_grad()
    return {name: parameter.numpy() for name, parameter in parameters.items()}, optimizer


def problem(num_steps=30, seed=0):
    rng = np.random.default_rng(seed)
    shapes = {name: parameter.shape for name, parameter in trainable(Net()).items()}
    start = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    gradients = [{name: rng.normal(size=shape) for name, shape in shapes.items()} for _ in range(num_steps)]
    return start, gradients, rng.uniform(0.01, 0.1, num_steps), rng.uniform(0.5, 1.0, num_steps)


@pytest.mark.parametrize("decay_norm_bias", [True, False])
@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_equals_the_recurrence(decay_norm_bias, nesterov):
    start, gradients, lrs, coefficients = problem()
    options = {"momentum": 0.9, "weight_decay": 0.01, "decay_norm_bias": decay_norm_bias, "nesterov": nesterov}
    ours, _ = run_ours(gradients, {"name": "sgd", **options}, lrs, coefficients, start)
    for name, w in start.items():
        decay = 0.01 if decay_norm_bias or w.ndim > 1 else 0.0
        v = np.zeros_like(w)
        for gradient, lr, coefficient in zip(gradients, lrs, coefficients, strict=True):
            g = coefficient * gradient[name] + decay * w
            v = 0.9 * v + g
            # set_lr stores float32: the reference uses the same rate
            w = w - np.float64(np.float32(lr)) * (g + 0.9 * v if nesterov else v)
        np.testing.assert_allclose(ours[name], w, rtol=1e-6, atol=1e-9)


def test_adamw_equals_torch():
    torch = pytest.importorskip("torch")
    start, gradients, lrs, coefficients = problem(seed=1)
    ours, _ = run_ours(gradients, {"name": "adamw", "weight_decay": 0.1}, lrs, coefficients, start)
    tensors = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in start.items()}
    optimizer = torch.optim.AdamW(list(tensors.values()), lr=0.1, weight_decay=0.1)
    for gradient, lr, coefficient in zip(gradients, lrs, coefficients, strict=True):
        optimizer.param_groups[0]["lr"] = float(np.float32(lr))
        for name, tensor in tensors.items():
            tensor.grad = torch.tensor(coefficient * gradient[name])
        optimizer.step()
    for name, tensor in tensors.items():
        np.testing.assert_allclose(ours[name], tensor.detach().numpy(), rtol=1e-5, atol=1e-7)


def test_lars_equals_the_paper():
    start, gradients, lrs, coefficients = problem(seed=2)
    options = {"name": "lars", "momentum": 0.9, "weight_decay": 0.01, "trust": 0.02, "decay_norm_bias": False}
    ours, _ = run_ours(gradients, options, lrs, coefficients, start)
    for name, w in start.items():
        v = np.zeros_like(w)
        for gradient, lr, coefficient in zip(gradients, lrs, coefficients, strict=True):
            g = coefficient * gradient[name]
            decay, ratio = (0.01, None) if w.ndim > 1 else (0.0, 1.0)
            if ratio is None:
                ratio = 0.02 * np.linalg.norm(w) / (np.linalg.norm(g) + decay * np.linalg.norm(w))
            v = 0.9 * v + lr * ratio * (g + decay * w)
            w = w - v
        np.testing.assert_allclose(ours[name], w, rtol=1e-5, atol=1e-7)  # Paddle keeps the momentum in float32


def test_lars_survives_zero_weights_and_gradients():
    start, gradients, lrs, coefficients = problem(2)
    start = {name: np.zeros_like(value) for name, value in start.items()}
    gradients = [{name: np.zeros_like(value) for name, value in each.items()} for each in gradients]
    ours, _ = run_ours(gradients, {"name": "lars"}, lrs, coefficients, start)
    assert all(np.isfinite(value).all() for value in ours.values())


@pytest.mark.parametrize("name", ["sgd", "adamw", "lars"])
def test_state_continues_bit_for_bit_in_a_second_network(name):
    """The second network's parameters have other framework names; state goes by structure."""
    start, gradients, lrs, coefficients = problem()
    whole, _ = run_ours(gradients, {"name": name}, lrs, coefficients, start)
    half, first = run_ours(gradients[:15], {"name": name}, lrs[:15], coefficients[:15], start)
    state = first.state()
    assert all(key.rpartition("/")[0] in half for key in state)
    other = Net()
    parameters = trainable(other)
    for key, parameter in parameters.items():
        parameter.set_value(half[key])
    optimizer = BackboneOptimizer(parameters, name=name)
    optimizer.load_state(state, first.num_updates)
    for gradient, lr, coefficient in zip(gradients[15:], lrs[15:], coefficients[15:], strict=True):
        for key, parameter in parameters.items():
            parameter.grad = paddle.to_tensor(gradient[key])
        optimizer.step(lr, coefficient)
    assert optimizer.num_updates == 30
    for key, parameter in parameters.items():
        np.testing.assert_array_equal(parameter.numpy(), whole[key])


def test_state_of_another_network_is_refused():
    start, gradients, lrs, coefficients = problem(2)
    _, optimizer = run_ours(gradients, {"name": "sgd"}, lrs, coefficients, start)
    state = optimizer.state()
    with pytest.raises(ValueError, match="names differ"):
        BackboneOptimizer(trainable(Net())).load_state({**state, "fc.other/velocity": np.zeros(1)})
    with pytest.raises(ValueError, match=r"fc.weight/velocity"):
        BackboneOptimizer(trainable(Net())).load_state({**state, "fc.weight/velocity": np.zeros((2, 2))})


def test_norms_and_biases():
    flags = {name: is_norm_or_bias(name, parameter) for name, parameter in trainable(Net()).items()}
    assert flags == {"fc.weight": False, "fc.bias": True, "bn.weight": True, "bn.bias": True}


def test_global_norm_and_clip():
    """The global norm, not each tensor's; PyTorch's clip_grad_norm_ is the reference."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(3)
    net = Net()
    parameters = list(trainable(net).values())
    arrays = [rng.normal(size=parameter.shape) * 3 for parameter in parameters]
    for parameter, array in zip(parameters, arrays, strict=True):
        parameter.grad = paddle.to_tensor(array)
    norm = gradient_norm(parameters)
    tensors = [torch.nn.Parameter(torch.zeros(array.shape, dtype=torch.float64)) for array in arrays]
    for tensor, array in zip(tensors, arrays, strict=True):
        tensor.grad = torch.tensor(array)
    expected = float(torch.nn.utils.clip_grad_norm_(tensors, 2.0))
    assert norm == pytest.approx(expected, rel=1e-12)
    assert clip_coefficient(norm, 2.0) * norm == pytest.approx(2.0)
    assert clip_coefficient(1.5, 2.0) == 1.0 and clip_coefficient(1e9, 0.0) == 1.0
    assert gradient_norm(parameters, grad_scale=8.0) == pytest.approx(expected / 8)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_norm_tells_non_finite_gradients(value):
    net = Net("float32")
    parameters = list(trainable(net).values())
    for parameter in parameters:
        parameter.grad = paddle.ones_like(parameter)
    array = np.ones(parameters[-1].shape, np.float32)
    array[-1] = value
    parameters[-1].grad = paddle.to_tensor(array)
    assert not math.isfinite(gradient_norm(parameters))


def test_norm_of_scaled_gradients_does_not_overflow():
    """Gradients of 1e17 at a loss scale of 65536: their squares exceed float32, the unscaled ones do not."""
    net = Net("float32")
    parameters = list(trainable(net).values())
    for parameter in parameters:
        parameter.grad = paddle.full_like(parameter, 6.5536e19)
    count = sum(parameter.size for parameter in parameters)
    assert gradient_norm(parameters, 65536.0) == pytest.approx(1e15 * math.sqrt(count), rel=1e-5)


def test_loss_scale_follows_the_rule():
    scaler = LossScaler("fp16", scale=1024.0, max_skips=3, growth_interval=2)
    history = []
    for skipped in (False, False, True, False, True, True):
        scaler.update(skipped)
        history.append(scaler.scale)
    assert history == [1024, 2048, 1024, 1024, 512, 256]
    with pytest.raises(UserError, match=r"3 updates in a row.*bf16"):
        scaler.update(True)


def test_scaler_state_round_trip_and_fp32_stays_one():
    scaler = LossScaler("fp16", scale=64.0)
    for skipped in (True, False, False):
        scaler.update(skipped)
    other = LossScaler("fp16", scale=1.0)
    other.load_state(scaler.state())
    assert other.state() == scaler.state() and other.scale == 32.0
    plain = LossScaler("fp32", scale=64.0)
    plain.update(True)
    assert plain.scale == 1.0 and plain.skips == 1


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_reduced_precision_on_cpu_is_an_error(precision):
    """Paddle switches amp off on CPU with a warning only."""
    with pytest.raises(UserError, match=f"run.precision: {precision}"):
        check_precision(precision, "cpu")
    check_precision("fp32", "cpu")
    check_precision(precision, "gpu:0", (8, 0))


def test_bf16_needs_a_gpu_that_has_it():
    with pytest.raises(UserError, match=r"7\.5.*run\.precision=fp16"):
        check_precision("bf16", "gpu:0", (7, 5))
    check_precision("fp16", "gpu:0", (7, 5))


@pytest.mark.parametrize(
    ("capability", "runs"),
    [((6, 0), False), ((6, 1), True), ((7, 2), True), ((8, 9), True), ((9, 0), False), ((10, 0), False)],
)
def test_cards_that_the_wheel_of_pip_has_code_for(capability, runs):
    problem = without_machine_code(capability, "2.6.2", "11.8")
    assert (problem is None) == runs
    assert runs or ("CUDA 12" in problem and f"{capability[0]}.{capability[1]}" in problem)
    assert without_machine_code(capability, "3.3.1", "12.6") is None  # not looked into: not judged


def test_ema_equals_the_recurrence_and_gives_weights_back():
    paddle.seed(0)
    net = Net()
    ema = Ema(net, 0.9)
    expected = {name: tensor.numpy() for name, tensor in net.state_dict().items()}
    rng = np.random.default_rng(5)
    for number in range(12):
        for tensor in net.state_dict().values():
            tensor.set_value(rng.normal(size=tensor.shape))
        ema.update(net)
        decay = min(0.9, (1 + number) / (10 + number))
        for name, tensor in net.state_dict().items():
            expected[name] = decay * expected[name] + (1 - decay) * tensor.numpy()
    own = {name: tensor.numpy() for name, tensor in net.state_dict().items()}
    with ema.applied_to(net):
        for name, tensor in net.state_dict().items():
            np.testing.assert_allclose(tensor.numpy(), expected[name], rtol=1e-6)
    for name, tensor in net.state_dict().items():
        np.testing.assert_array_equal(tensor.numpy(), own[name])
    other = Ema(net, 0.9)
    other.load_state(ema.state(), ema.num_updates)
    ema.update(net)
    other.update(net)
    for name, value in ema.state().items():
        np.testing.assert_array_equal(other.state()[name], value)
