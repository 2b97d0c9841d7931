"""tools/export.py: both formats of every family, read by others, checked by the command itself."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import paddle
import pytest

from backbones import BACKBONES
from tests.test_embed import SMALL, state_of, trained_like
from tools import export as export_module
from tools.export import BATCHES, export, main
from tools.numpy_forward import reference_embedding
from utils.errors import UserError
from utils.weights.states import save_pdparams


def write_weights(path, layer):
    save_pdparams(path, state_of(layer))
    return path


def test_the_command_writes_and_checks_both(tmp_path, capsys):
    layer = trained_like(width=8, embedding_size=32)
    weights = write_weights(tmp_path / "backbone.pdparams", layer)
    main(["--model", str(weights), "--network", "iresnet18", "--output", str(tmp_path / "out")])
    told = capsys.readouterr().out
    for batch in (1, 7, 64):
        assert sum(f"|   {batch:<3} |" in line for line in told.splitlines()) == 2, told
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert "model.onnx" in files and "model.pdiparams" in files and not any(name.startswith(".") for name in files)
    # Read by onnxruntime alone, against float64 numpy, at batch sizes the command did not try.
    session = onnxruntime.InferenceSession(str(tmp_path / "out/model.onnx"), providers=["CPUExecutionProvider"])
    assert not isinstance(session.get_inputs()[0].shape[0], int)
    for batch in (1, 3):
        image = np.random.default_rng(batch).uniform(-1, 1, (batch, 3, 112, 112)).astype(np.float32)
        expected = reference_embedding(state_of(layer), False, image)
        np.testing.assert_allclose(session.run(None, {session.get_inputs()[0].name: image})[0], expected, atol=1e-4)
        loaded = paddle.jit.load(str(tmp_path / "out/model"))
        np.testing.assert_allclose(loaded(paddle.to_tensor(image)).numpy(), expected, atol=1e-4)
    onnx.checker.check_model(onnx.load(str(tmp_path / "out/model.onnx")))


def test_the_batches_are_those_promised():
    assert BATCHES == (1, 7, 64)


@pytest.mark.parametrize("network", ["vit_t", "mnist_2d"])
def test_small_families(tmp_path, network):
    layer = trained_like(network, **SMALL[network])
    rows = export(layer, tmp_path, batches=(1, 3))
    assert len(rows) == 4 and all(row["difference"] < 1e-4 * max(1, row["scale"]) for row in rows)
    assert (tmp_path / "model.onnx").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("network", sorted(BACKBONES))
def test_every_backbone(tmp_path, network):
    options = SMALL.get(network, {"width": 64 if network.startswith("vit") else 8, "embedding_size": 32})
    rows = export(trained_like(network, **options), tmp_path)
    assert len(rows) == 6 and all(row["difference"] < 1e-4 * max(1, row["scale"]) for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("network", ["iresnet50", "iresnet100", "vit_b", "mobilefacenet"])
def test_full_size(tmp_path, network):
    rows = export(trained_like(network), tmp_path, batches=(1, 7))
    assert all(row["difference"] < 1e-4 * max(1, row["scale"]) for row in rows)


def test_a_difference_leaves_nothing(tmp_path, monkeypatch):
    layer = trained_like("mnist_2d")
    honest = export_module.OnnxEngine.run
    monkeypatch.setattr(export_module.OnnxEngine, "run", lambda self, image: honest(self, image) + 1e-3)
    with pytest.raises(UserError, match=r"onnx differs from the dynamic graph by 0\.001"):
        export(layer, tmp_path / "out", batches=(1,))
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_exported_is_told(tmp_path, capsys):
    layer = trained_like("mnist_2d")
    layer.fc.bias.set_value(np.full(2, np.nan, np.float32))
    with pytest.raises(UserError, match="not finite"):
        export(layer, tmp_path, batches=(1,))
    assert list(tmp_path.iterdir()) == []
    for arguments, shown in (
        (["--model", str(tmp_path / "no.pdparams"), "--output", str(tmp_path)], "no such weights file"),
        (["--model", str(tmp_path), "--output", str(tmp_path), "--format", "tflite"], "choose from paddle, onnx"),
        (["--model", str(tmp_path), "--output", str(tmp_path), "--opset", "-1"], "--opset -1: at least 7"),
    ):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 1
        assert shown in capsys.readouterr().err


def test_names_with_dots(tmp_path, capsys):
    """Exports of a sweep lie side by side; only the files that were written are named."""
    weights = write_weights(tmp_path / "w.pdparams", trained_like("mnist_2d", **SMALL["mnist_2d"]))
    arguments = ["--model", str(weights), "--network", "mnist_2d", "--output", str(tmp_path / "out"), "--device", "cpu"]
    for name in ("r50_lr0.1", "r50_lr0.2", "r50_lr0"):
        main([*arguments, "--name", name, "--format", " paddle, onnx"])
        told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("wrote ")]
        assert len(told) == 3 and all(Path(line[6:]).stem == name for line in told)
    assert len(list((tmp_path / "out").iterdir())) == 9
    for name in ("model.onnx", "a/b", ""):
        with pytest.raises(SystemExit):
            main([*arguments, "--name", name])
        assert f"--name {name}: a file name without folder" in capsys.readouterr().err
