"""One update in one process: accumulation, clipping, averages, skips, frozen stages, fine-tuning, early stop."""

import json
from pathlib import Path

import numpy as np
import paddle
import pytest
import torch

import train
from backbones import build_backbone
from backbones.layers import FrozenScaleNorm
from config import load_config
from utils.errors import UserError
from utils.model.precision import LossScaler
from utils.model.replica import _synchronise_norms
from utils.run.checkpoint import list_checkpoints

pytestmark = pytest.mark.filterwarnings("ignore")
CONFIG = """
run: {output: OUTPUT, device: cpu, seed: 3, batch_size: 8, epochs: 1, hang_timeout: 0}
data: {kind: synthetic, num_classes: 6, num_images: 32, num_threads: 1, flip: false}
model: {network: vit_t, input_size: 36, embedding_size: 16}
head: {margin: {name: arcface, s: 16.0, m: 0.2}}
optim: {lr: 0.05, clip_norm: 0.0, weight_decay: 0.0}
schedule: {name: constant}
log: {tensorboard: false}
"""


def config(tmp_path, *overrides, name="run"):
    path = tmp_path / f"{name}.yaml"
    path.write_text(CONFIG.replace("OUTPUT", str(tmp_path / name)))
    return load_config(path, ["model.network=resnet18", "model.width=8", "model.input_size=32", *overrides])


def build(tmp_path, *overrides, name="run"):
    return train.build(config(tmp_path, *overrides, name=name))


def weights(run):
    return {name: tensor.numpy() for name, tensor in run.replica.backbone.state_dict().items()}


def evaluate_norms(run):
    """Batch norms use their running statistics, so that a batch's gradient is the mean of its parts'."""
    for layer in run.replica.backbone.sublayers():
        if isinstance(layer, (paddle.nn.BatchNorm1D, paddle.nn.BatchNorm2D)):
            layer.eval()


def take(run, count):
    iterator = iter(run.loader)
    return [next(iterator) for _ in range(count)]


def test_accumulation_is_the_mean_over_micro_batches(tmp_path):
    """Two micro-batches of 8 give the update of one batch of 16, head included."""
    runs = [build(tmp_path, "head.sample_rate=1.0", name=name) for name in ("parts", "whole")]
    batches = take(runs[0], 2)
    joined = [(paddle.concat([b[0] for b in batches]), paddle.concat([b[1] for b in batches]))]
    for run in runs:
        evaluate_norms(run)
    start = weights(runs[0])
    done = [train.update(runs[0], batches, 0.05), train.update(runs[1], joined, 0.05)]
    assert done[0].loss == pytest.approx(done[1].loss, rel=1e-5)
    assert done[0].grad_norm == pytest.approx(done[1].grad_norm, rel=1e-4)
    ours, expected = weights(runs[0]), weights(runs[1])
    moved = max(np.abs(expected[name] - start[name]).max() for name in start)
    assert moved > 1e-4
    for name, value in expected.items():
        np.testing.assert_allclose(ours[name], value, atol=1e-3 * moved, err_msg=name)
    np.testing.assert_allclose(runs[0].head.export_weight(), runs[1].head.export_weight(), rtol=1e-4, atol=1e-7)


def test_clip_acts_on_the_backbone_only_and_on_its_global_norm(tmp_path):
    """The step of plain SGD is lr * clipped gradient; the head's is not clipped."""
    runs = [build(tmp_path, f"optim.clip_norm={clip}", name=f"c{clip}") for clip in (0.0, 0.01)]
    start, head_start = weights(runs[0]), runs[0].head.export_weight()
    batch = take(runs[0], 1)
    done = [train.update(run, batch, 0.1) for run in runs]
    assert done[0].grad_norm == pytest.approx(done[1].grad_norm)
    names = list(runs[0].optimizer.parameters)
    steps = [np.concatenate([(weights(run)[name] - start[name]).ravel() for name in names]) for run in runs]
    assert np.linalg.norm(steps[0]) == pytest.approx(0.1 * done[0].grad_norm, rel=1e-3)
    assert np.linalg.norm(steps[1]) == pytest.approx(0.1 * 0.01, rel=1e-2)
    moved = [run.head.export_weight() - head_start for run in runs]
    assert np.abs(moved[0]).max() > 0
    np.testing.assert_array_equal(moved[0], moved[1])


def test_learning_rate_scales_of_backbone_and_head(tmp_path):
    run = build(tmp_path, "optim.backbone_lr_scale=0", "head.lr_scale=2.0")
    plain = build(tmp_path, name="plain")
    batch = take(run, 1)
    start, head_start = weights(run), run.head.export_weight()
    for each in (run, plain):
        train.update(each, batch, 0.1)
    for name in run.optimizer.parameters:
        np.testing.assert_array_equal(weights(run)[name], start[name])
    np.testing.assert_allclose(
        run.head.export_weight() - head_start, 2 * (plain.head.export_weight() - head_start), rtol=1e-3, atol=1e-7
    )


def test_loss_scale_cancels_and_a_skip_changes_nothing(tmp_path):
    """The scale is a power of two: scaled and unscaled updates agree; an infinite gradient is skipped, scale halved."""
    plain, scaled = build(tmp_path), build(tmp_path, name="scaled")
    scaled.scaler = LossScaler("fp16", 1024.0)
    batch = take(plain, 1)
    done = [train.update(run, batch, 0.05) for run in (plain, scaled)]
    assert done[0].grad_norm == pytest.approx(done[1].grad_norm, rel=1e-5)
    for name, value in weights(plain).items():
        np.testing.assert_allclose(weights(scaled)[name], value, rtol=1e-5, atol=1e-7)
    before, velocity = weights(scaled), scaled.optimizer.state()
    scaled.scaler.scale = 3e38  # overflows in backward
    assert train.update(scaled, batch, 0.05).skipped
    for name, value in weights(scaled).items():
        np.testing.assert_array_equal(value, before[name])
    for name, value in scaled.optimizer.state().items():
        np.testing.assert_array_equal(value, velocity[name])
    assert scaled.scaler.scale == 1.5e38 and scaled.scaler.skips == 1


def test_squares_that_leave_float32_are_skipped(tmp_path):
    """Finite scaled gradients whose squares are not: seen, skipped, nothing moved; a smaller scale goes on."""
    run = build(tmp_path, "run.ema=0.9")
    run.scaler = LossScaler("fp16", 2.0**75)
    batch = take(run, 1)
    finite, clear = [], run.optimizer.clear_grad

    def look():
        finite.append(all(np.isfinite(grad.numpy()).all() for grad in run.optimizer.gradients()))
        clear()

    run.optimizer.clear_grad = look
    before, centres = weights(run), run.head.row_state()
    done = train.update(run, batch, 0.05)
    assert finite == [True] and done.skipped and not np.isfinite(done.grad_norm) and np.isfinite(done.loss)
    assert run.scaler.scale == 2.0**74 and run.head.num_updates == 1 and run.ema.num_updates == 0
    for name, value in weights(run).items():
        np.testing.assert_array_equal(value, before[name], err_msg=name)
    for name, value in run.head.row_state().items():
        np.testing.assert_array_equal(value, centres[name], err_msg=name)
    run.scaler.scale = 2.0**10
    assert not train.update(run, batch, 0.05).skipped


def test_a_bad_record_ahead_does_not_cost_the_update_before(tmp_path):
    """The next update's batches are fetched during the present one: what is wrong with them waits for its end."""
    run = build(tmp_path, "checkpoint.every_steps=1", "log.angles=false")
    loader = run.loader

    class Broken:
        def __getattr__(self, name):
            return getattr(loader, name)

        def __iter__(self):
            iterator = iter(loader)
            yield next(iterator)
            yield next(iterator)
            raise UserError("record 7 is cut short")

    run.loader = Broken()
    with pytest.raises(UserError, match="record 7"):
        train.train(run)
    assert run.progress.step == 2
    run.writer.wait()
    run.writer.finish(run.writer.failed)
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["step_00000002", "step_00000001"]


def test_skips_in_a_row_end_the_run_with_advice(tmp_path):
    run = build(tmp_path, "run.max_skips=3")
    image, label = take(run, 1)[0]
    with pytest.raises(UserError, match=r"3 updates in a row.*lower optim\.lr"):
        for _ in range(5):
            assert train.update(run, [(image * float("inf"), label)], 0.05).skipped


def test_frozen_stages_and_initial_weights(tmp_path):
    first = build(tmp_path, name="first")
    batch = take(first, 1)
    train.update(first, batch, 0.1)
    paddle.save(first.replica.backbone.state_dict(), str(tmp_path / "start.pdparams"))
    np.save(tmp_path / "centres.npy", first.head.export_weight())
    tuned = build(
        tmp_path, f"init.backbone={tmp_path}/start.pdparams", f"init.head={tmp_path}/centres.npy",
        "init.freeze=[conv1, layer1]", name="tuned",
    )  # fmt: skip
    start = weights(tuned)
    for name, value in weights(first).items():
        np.testing.assert_array_equal(start[name], value)
    np.testing.assert_array_equal(tuned.head.export_weight(), first.head.export_weight())
    train.update(tuned, batch, 0.1)
    changed = {
        name for name in tuned.replica.backbone.state_dict() if not np.array_equal(weights(tuned)[name], start[name])
    }
    frozen = {name for name in start if name.startswith(("conv1.", "layer1."))}
    assert any(name.endswith("._mean") for name in frozen)  # a frozen stage keeps its statistics as well
    assert not frozen & changed
    assert any(name.startswith("layer4.") for name in changed)


def test_synchronised_norms_keep_weights_modes_and_the_embedding_norm():
    backbone = build_backbone("iresnet18", width=4, input_size=32, embedding_size=16)
    backbone.layer1.eval()
    before = {name: tensor.numpy() for name, tensor in backbone.state_dict().items()}
    norms = [name for name, part in backbone.named_sublayers() if isinstance(part, paddle.nn.BatchNorm2D)]
    modes = [part.training for part in backbone.sublayers()]
    _synchronise_norms(backbone)
    parts = dict(backbone.named_sublayers())
    assert norms and all(type(parts[name]) is paddle.nn.SyncBatchNorm for name in norms)
    assert type(backbone.features) is FrozenScaleNorm
    assert [part.training for part in backbone.sublayers()] == modes
    for name, tensor in backbone.state_dict().items():
        np.testing.assert_array_equal(tensor.numpy(), before[name])


def test_average_is_what_is_verified_and_kept_as_best(tmp_path, monkeypatch):
    """EMA: the best file holds the average, the last one the weights; early stop by patience."""
    seen, scores = [], iter([0.6, 0.8, 0.7, 0.75, 0.9])

    class Judge:
        warnings = ()

        def __init__(self, *_):
            pass

        def __call__(self, backbone):
            seen.append({name: tensor.numpy() for name, tensor in backbone.state_dict().items()})
            return {"lfw": {"accuracy": next(scores)}}

    monkeypatch.setattr(train, "Verification", Judge)
    run = build(
        tmp_path, "run.ema=0.5", "verify.sets=[lfw]", "verify.every_steps=1", "verify.patience=2", "run.epochs=9"
    )
    train.train(run)
    assert run.progress.step == 4 and run.progress.stopped_early and run.progress.best == 0.8
    best = paddle.load(str(tmp_path / "run" / "backbone_best.pdparams"))
    last = paddle.load(str(tmp_path / "run" / "backbone.pdparams"))
    average = paddle.load(str(tmp_path / "run" / "backbone_ema.pdparams"))
    for name, value in seen[1].items():
        np.testing.assert_array_equal(best[name].numpy(), value)
    assert any(not np.array_equal(average[name].numpy(), last[name].numpy()) for name in last)
    for name, value in weights(run).items():
        np.testing.assert_array_equal(last[name].numpy(), value)
    assert (tmp_path / "run" / "best").read_text() == "step_00000002\n"
    assert (tmp_path / "run" / "checkpoints" / "step_00000002").is_dir()
    verified = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["accuracy"] for line in verified if line["kind"] == "verify"] == [0.6, 0.8, 0.7, 0.75]


def test_a_spike_names_the_records(tmp_path):
    run = build(tmp_path)
    take(run, 1)
    run.batch_keys = run.loader.last_keys
    for _ in range(40):
        run.spikes.observe(1.0 + 0.01 * np.random.default_rng(0).normal())
    from utils.run.steps import report_odd

    report_odd(run, train.Update(loss=9.0, grad_norm=1.0, skipped=False))
    run.log.close()
    (event,) = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert event["what"] == "spike" and event["records"] == run.batch_keys.tolist() and len(event["records"]) == 8
    assert str(run.batch_keys[0]) in (tmp_path / "run" / "train.log").read_text()


def test_a_finished_run_resumed_trains_nothing_and_a_longer_one_goes_on(tmp_path):
    train.train(build(tmp_path))
    (path,) = list_checkpoints(tmp_path / "run")
    again = build(tmp_path, "checkpoint.resume=auto")
    train.train(again)
    assert again.progress.step == 4 and list_checkpoints(tmp_path / "run") == [path]
    longer = build(tmp_path, "checkpoint.resume=auto", "run.epochs=2")
    train.train(longer)
    assert longer.progress.step == 8


def test_summary_says_what_matters(tmp_path):
    run = build(tmp_path, "optim.lr_batch=16", "optim.lr=0.2")
    run.log.close()
    text = (Path(tmp_path) / "run" / "train.log").read_text()
    parameters = sum(
        p.size for n, p in run.replica.backbone.named_parameters() if not n.endswith(("_mean", "_variance"))
    )
    for words in (
        f"{int(parameters):,} parameters",
        "6 classes",
        "8 images an update",
        "lr 0.1 (0.2 x 8 / 16)",
        "4 updates",
    ):
        assert words in text, words


def test_float64_step_equals_torch_for_a_linear_backbone(tmp_path):
    """The whole update (margin off, momentum, decay, both parts) against PyTorch in float64, three steps."""
    run = build(tmp_path, "head.margin={name: softmax, s: 8.0}", "optim.weight_decay=0.01")
    layer = paddle.nn.Linear(12, 16)
    from utils.model.optimizer import BackboneOptimizer, trainable
    from utils.model.replica import Replica

    run.replica = Replica(layer)
    run.optimizer = BackboneOptimizer(trainable(layer), weight_decay=0.01)
    w = torch.nn.Parameter(torch.tensor(layer.weight.numpy(), dtype=torch.float64))
    b = torch.nn.Parameter(torch.tensor(layer.bias.numpy(), dtype=torch.float64))
    c = torch.nn.Parameter(torch.tensor(run.head.export_weight(), dtype=torch.float64))
    sgd = torch.optim.SGD([w, b, c], lr=0.1, momentum=0.9, weight_decay=0.01)
    rng = np.random.default_rng(0)
    for _ in range(3):
        x, y = rng.normal(size=(8, 12)), rng.integers(0, 6, 8)
        done = train.update(run, [(paddle.to_tensor(x.astype(np.float32)), paddle.to_tensor(y))], 0.1)
        e = torch.nn.functional.normalize(torch.tensor(x) @ w + b)
        loss = torch.nn.functional.cross_entropy(8.0 * e @ torch.nn.functional.normalize(c).T, torch.tensor(y))
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        assert done.loss == pytest.approx(float(loss), rel=1e-5)
    np.testing.assert_allclose(layer.weight.numpy(), w.detach().numpy(), atol=1e-5)
    np.testing.assert_allclose(run.head.export_weight(), c.detach().numpy(), atol=1e-5)
