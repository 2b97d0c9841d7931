"""tools/convert.py and the readers under it: real PyTorch files, real ONNX exports, hostile and wrong ones."""

import argparse
import io
import os
import pickle
import zipfile
from collections import defaultdict
from pathlib import Path

import numpy as np
import onnx
import paddle
import pytest
import torch
import yaml
from onnx import helper, numpy_helper

from backbones import build_backbone
from backbones.guess import guess_network
from benchmarks.peer_backbones import IResNet, MobileFaceNet, randomise
from eval.embed import load_backbone, load_embedder
from eval.engines import DynamicEngine, OnnxEngine
from tests.test_embed import pictures, state_of, trained_like
from tools import convert as convert_module
from tools.convert import main
from tools.export import export
from tools.numpy_forward import reference_embedding
from utils.errors import UserError
from utils.weights.head_files import read_head
from utils.weights.onnx_walk import read_onnx
from utils.weights.states import is_torch_file, load_state, read_state, save_pdparams
from utils.weights.torch_pickle import load_torch, save_torch

SMALL_PEERS = (
    "iresnet18",
    "mobilefacenet",
    "mobilefacenet_small",
    pytest.param("mobilefacenet_large", marks=pytest.mark.slow),
)
PEERS = {
    "iresnet18": lambda: IResNet((2, 2, 2, 2), 8, 32),
    "iresnet34": lambda: IResNet((3, 4, 6, 3), 8, 32),
    "mobilefacenet": lambda: MobileFaceNet((1, 4, 6, 2), 1.0, 16, 32),
    "mobilefacenet_small": lambda: MobileFaceNet((1, 4, 6, 2), 2.0, 8, 32),
    "mobilefacenet_large": lambda: MobileFaceNet((2, 8, 12, 4), 0.5, 16, 32),
}
CENTRES = np.random.default_rng(5).normal(size=(11, 32)).astype(np.float32)


@pytest.fixture(scope="module")
def peer():
    return randomise(PEERS["iresnet18"]())


def embed_torch(network, image_BCHW):
    with torch.no_grad():
        return network(torch.from_numpy(image_BCHW)).numpy()


def batch(count=2):
    return np.random.default_rng(1).uniform(-1, 1, (count, 3, 112, 112)).astype(np.float32)


def close_float32(found, expected):
    """To 1e-4 of the largest value: PyTorch's own float32 is 3e-5 away from its float64 at values around ten."""
    np.testing.assert_allclose(found, expected, atol=1e-4 * max(1, abs(expected).max()))


def run_failing(capsys, *args):
    """The command's one line on stderr; its exit status must be 1."""
    with pytest.raises(SystemExit) as caught:
        main([str(arg) for arg in args])
    assert caught.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


# --- PyTorch files, without PyTorch


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "stream"])
def test_pt_files_are_read_without_torch(tmp_path, zipped):
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    content = {
        "double": torch.randn(3, 2, dtype=torch.float64),
        "half": torch.randn(5).half(),
        "bfloat": torch.randn(4, 3).bfloat16(),
        "bool": torch.tensor([True, False]),
        "long": torch.tensor(2**40),
        "view": base[1:3, 2:5],
        "transposed": base.t(),
        "shared": base,
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(torch.randn(2, 2)),
        "nested": {"list": [1, -(2**70), 1.5, None, True, "text"], "tuple": (1, torch.ones(2))},
        7: "integer key",
    }
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    found = load_torch(tmp_path / "a.pt")
    assert list(found) == list(content)
    for name, value in content.items():
        if isinstance(value, torch.Tensor):
            expected = (value.float() if value.dtype == torch.bfloat16 else value).detach().numpy()
            assert found[name].dtype == expected.dtype
            np.testing.assert_array_equal(found[name], expected)
    assert found["nested"]["list"] == content["nested"]["list"]
    np.testing.assert_array_equal(found["nested"]["tuple"][1], [1, 1])


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "stream"])
def test_pt_files_are_not_executed(tmp_path, zipped, capsys):
    """Neither a call nor a whole module gets through."""
    torch.save({"x": Bomb(tmp_path / "ran")}, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    assert "nothing was executed" in run_failing(capsys, tmp_path / "a.pt", tmp_path / "o.pdparams")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    assert "torch.nn.modules.linear.Linear" in run_failing(capsys, tmp_path / "a.pt", tmp_path / "o.pdparams")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pt"]


def forged(tmp_path, size, stride, offset=0, length=4, numel=4):
    """A .pt whose one tensor claims a size, stride and offset over a storage of ``length`` values."""
    stream = io.BytesIO()

    class Pickler(pickle.Pickler):
        def persistent_id(self, item):
            return ("storage", torch.FloatStorage, "0", "cpu", numel) if item == "STORAGE" else None

        def reducer_override(self, item):
            if item == "TENSOR":
                return torch._utils._rebuild_tensor_v2, ("STORAGE", offset, size, stride, False, {})
            return NotImplemented

    class Tensor:
        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, ("STORAGE", offset, size, stride, False, {})

    Pickler(stream, 2).dump({"w": Tensor()})
    with zipfile.ZipFile(tmp_path / "f.pt", "w") as archive:
        archive.writestr("a/data.pkl", stream.getvalue())
        archive.writestr("a/data/0", np.zeros(length, np.float32).tobytes())
    return tmp_path / "f.pt"


@pytest.mark.parametrize(
    "claim",
    [
        {"size": (5,), "stride": (1,)},
        {"size": (2,), "stride": (4,)},
        {"size": (2,), "stride": (1,), "offset": 3},
        {"size": (1 << 40,), "stride": (0,)},
        {"size": (2, 2), "stride": (1,)},
        {"size": (2,), "stride": (-1,), "offset": 3},
        {"size": (4,), "stride": (1,), "length": 3},
        {"size": (1 << 40,), "stride": (1,), "numel": 1 << 40},
    ],
)
def test_tensors_outside_their_storage_are_refused(tmp_path, claim):
    with pytest.raises(UserError):
        load_torch(forged(tmp_path, **claim))


def test_a_plain_forged_tensor_is_read(tmp_path):
    np.testing.assert_array_equal(load_torch(forged(tmp_path, (2, 2), (2, 1)))["w"], np.zeros((2, 2)))


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "stream"])
def test_cut_and_damaged_files_are_one_error(tmp_path, zipped):
    torch.save({"w": torch.randn(40, 5), "n": [1, 2]}, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    data = (tmp_path / "a.pt").read_bytes()
    rng = np.random.default_rng(0)
    for trial in range(120):
        damaged = bytearray(data[: rng.integers(0, len(data))] if trial % 2 else data)
        for _ in range(3 if damaged else 0):
            damaged[rng.integers(0, len(damaged))] = rng.integers(0, 256)
        (tmp_path / "b.pt").write_bytes(damaged)
        try:
            load_torch(tmp_path / "b.pt")
        except UserError as error:
            assert str(error).startswith(str(tmp_path / "b.pt"))


def test_what_we_write_torch_reads(tmp_path):
    content = {
        "state": {
            "w": np.arange(6, dtype=np.float32).reshape(2, 3),
            "n": np.zeros((), np.int64),
            "e": np.zeros((0, 2)),
        },
        "l": [1, -300, 2**70, 0.5, None, True],
        3: (1, "text"),
        "fortran": np.asfortranarray(np.arange(6, dtype=np.float16).reshape(2, 3)),
    }
    save_torch(tmp_path / "a.pt", content)
    found = torch.load(tmp_path / "a.pt", weights_only=True)
    assert found["l"] == content["l"] and found[3] == content[3]
    for name, value in {**content["state"], "fortran": content["fortran"]}.items():
        tensor = found["fortran"] if name == "fortran" else found["state"][name]
        assert tensor.shape == value.shape
        np.testing.assert_array_equal(tensor.numpy(), value)
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]
    with pytest.raises(TypeError, match="a set"):
        save_torch(tmp_path / "b.pt", {"x": {1}})
    assert not (tmp_path / "b.pt").exists()


# --- the oracle of conversions


@pytest.mark.parametrize("network", SMALL_PEERS)
def test_numpy_forward_is_pytorch_in_float64(network):
    net = randomise(PEERS[network](), num_images=4).double()
    state = {name: value.numpy() for name, value in net.state_dict().items()}
    image = batch().astype(np.float64)
    np.testing.assert_allclose(reference_embedding(state, True, image), embed_torch(net, image), atol=1e-10)


def test_numpy_forward_of_the_vision_transformer():
    """Attention by PyTorch's own kernel, the rest written out."""
    layer = trained_like("vit_t", width=64, embedding_size=16)
    state = {name: torch.from_numpy(value).double() for name, value in state_of(layer).items()}
    functional, image = torch.nn.functional, torch.from_numpy(batch().astype(np.float64))
    x = functional.conv2d(image, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=9)
    x = x.flatten(2).transpose(1, 2) + state["pos_embed"]
    for index in range(12):
        part = {name.split(".", 2)[2]: value for name, value in state.items() if name.startswith(f"blocks.{index}.")}
        out = functional.layer_norm(x, (64,), part["norm1.weight"], part["norm1.bias"])
        query, key, value = (out @ part["attn.qkv.weight"]).reshape(2, 144, 3, 8, 8).permute(2, 0, 3, 1, 4)
        out = functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(2, 144, 64)
        x = x + out @ part["attn.proj.weight"] + part["attn.proj.bias"]
        out = functional.layer_norm(x, (64,), part["norm2.weight"], part["norm2.bias"])
        out = functional.relu6(out @ part["mlp.fc1.weight"] + part["mlp.fc1.bias"])
        x = x + out @ part["mlp.fc2.weight"] + part["mlp.fc2.bias"]
    x = functional.layer_norm(x, (64,), state["norm.weight"], state["norm.bias"]).flatten(1)
    for linear, norm in ((0, 1), (2, 3)):
        name = f"feature.{norm}"
        x = functional.batch_norm(
            x @ state[f"feature.{linear}.weight"], state[f"{name}._mean"], state[f"{name}._variance"],
            state[f"{name}.weight"], state[f"{name}.bias"], eps=2e-5,
        )  # fmt: skip
    found = reference_embedding(state_of(layer), False, image.numpy())
    np.testing.assert_allclose(found, x.numpy(), atol=1e-10)


# --- there and back


@pytest.mark.parametrize("network", SMALL_PEERS)
def test_from_pytorch_and_back(tmp_path, capsys, network):
    """To ours by name, checked; back to a file that PyTorch loads strictly and that gives the same embeddings."""
    net = randomise(PEERS[network](), num_images=4)
    torch.save({f"module.{name}": value for name, value in net.state_dict().items()}, tmp_path / "source.pth")
    main([str(tmp_path / "source.pth"), str(tmp_path / "run")])
    told = capsys.readouterr().out
    assert f"{network}, {len(net.state_dict())} tensors" in told and "largest difference" in told
    found = DynamicEngine(load_backbone(tmp_path / "run")).run(batch())
    close_float32(found, embed_torch(net, batch()))
    section = yaml.safe_load((tmp_path / "run/config.yaml").read_text())["model"]
    assert section["network"] == network and section["embedding_size"] == 32 and section["input_size"] == 112
    main([str(tmp_path / "run"), str(tmp_path / "back.pt")])
    twin = PEERS[network]()
    twin.load_state_dict(torch.load(tmp_path / "back.pt", weights_only=True), strict=True)
    for name, value in net.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            torch.testing.assert_close(twin.state_dict()[name], value, rtol=0, atol=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back.pt", "run", "source.pth"]


WRAPPED = {
    "features.module.": lambda state: state,
    "backbone.module.": lambda state: {"state_dict": state},
    "model.": lambda state: {"epoch": 3, "model": state},
    "_orig_mod.module.": lambda state: {"net": {"state_dict": state}},
    "module.model._orig_mod.backbone.": lambda state: {"state_dict": state, "optimizer": {"state": {}, "lr": 0.1}},
    "": lambda state: {"model_state_dict": state},
}


@pytest.mark.parametrize("prefix", WRAPPED)
@pytest.mark.parametrize("name", ["a.pth.tar", "a.ckpt", "a.pt", "a.pdparams", "weights"])
def test_wrapped_names_and_other_suffixes(tmp_path, capsys, peer, prefix, name):
    """Told by content: names of wrappers are taken off, a head beside the backbone is passed over and named."""
    state = {prefix + key: value for key, value in peer.state_dict().items()}
    if prefix:
        state["fc_of_classes.weight"] = torch.zeros(7, 32)
    torch.save(WRAPPED[prefix](state), tmp_path / name)
    found = read_state(tmp_path / name)
    assert list(found) == list(peer.state_dict())
    assert is_torch_file(tmp_path / name)
    assert ("fc_of_classes.weight" in capsys.readouterr().err) == bool(prefix)
    np.testing.assert_array_equal(found["fc.weight"], peer.state_dict()["fc.weight"].numpy())


def test_what_a_weights_file_really_is(tmp_path, capsys):
    for name in ("a.pth", "a.pdparams", "a.pth.tar", "a.ckpt"):
        for data, told in (
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git-LFS pointer"),
            (b"<!DOCTYPE html><html></html>", "HTML page"),
            (b"\x1f\x8b\x08\x00" + bytes(20), "gzip data; unpack it first"),
            (b"", "empty file"),
        ):
            (tmp_path / name).write_bytes(data)
            assert told in run_failing(capsys, tmp_path / name, tmp_path / "o.pdparams"), (name, told)


@pytest.mark.slow
@pytest.mark.parametrize("depths", [(2, 2, 2, 2), (3, 4, 14, 3), (3, 13, 30, 3)])
def test_full_size_from_pytorch_and_back(tmp_path, capsys, depths):
    net = randomise(IResNet(depths), num_images=4)
    torch.save(net.state_dict(), tmp_path / "source.pth")
    main([str(tmp_path / "source.pth"), str(tmp_path / "a.safetensors")])
    main([str(tmp_path / "a.safetensors"), str(tmp_path / "back.pth")])
    IResNet(depths).load_state_dict(torch.load(tmp_path / "back.pth", weights_only=True), strict=True)
    found = load_embedder(tmp_path / "a.safetensors")(pictures(2))
    image = np.ascontiguousarray(pictures(2).transpose(0, 3, 1, 2)).astype(np.float32) / 127.5 - 1
    close_float32(found, embed_torch(net, image))


def test_vision_transformer_and_plain_resnet_there_and_back(tmp_path, capsys):
    for network, options in {"vit_t": {"width": 64}, "resnet18": {"width": 8, "input_size": 64}}.items():
        layer = trained_like(network, embedding_size=16, **options)
        run = tmp_path / network
        run.mkdir()
        save_pdparams(run / "backbone.pdparams", state_of(layer))
        section = {"network": network, "embedding_size": 16, **options}
        (run / "config.yaml").write_text(yaml.safe_dump({"model": section}))
        main([str(run), str(tmp_path / "a.pt")])
        again = tmp_path / f"{network}.pdparams"
        if network == "vit_t":
            main([str(tmp_path / "a.pt"), str(again)])
        else:  # its shapes do not tell the pool and the stem: a name is needed
            assert "name it" in run_failing(capsys, tmp_path / "a.pt", again)
            layer = build_backbone(network, embedding_size=16, **options)
            load_state(layer, read_state(tmp_path / "a.pt"), "a.pt")
            continue
        for name, value in read_state(again).items():
            np.testing.assert_array_equal(value, state_of(layer)[name])


def test_square_matrices_are_transposed():
    """By what the layer is, not by whether the shapes differ."""
    layer = paddle.nn.Linear(4, 4)
    weight = np.arange(16, dtype=np.float32).reshape(4, 4)
    load_state(layer, {"weight": weight, "bias": np.zeros(4, np.float32)}, "x.pt", from_torch=True)
    np.testing.assert_array_equal(layer.weight.numpy(), weight.T)
    load_state(layer, {"weight": weight, "bias": np.zeros(4, np.float32)}, "x.pdparams", from_torch=False)
    np.testing.assert_array_equal(layer.weight.numpy(), weight)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda state: state.pop("layer2.1.bn2.weight"), "missing: layer2.1.bn2.weight"),
        (lambda state: state.update(extra=torch.ones(2)), "left over: extra"),
        (lambda state: state.update({"bn2.bias": torch.ones(3)}), "shape: bn2.bias is [3] instead of [64]"),
        (lambda state: state["fc.bias"].fill_(float("nan")), "fc.bias holds values that are not finite"),
    ],
)
def test_every_misfit_is_named_and_nothing_is_left(tmp_path, capsys, peer, damage, told):
    state = {name: value.clone() for name, value in peer.state_dict().items()}
    damage(state)
    torch.save(state, tmp_path / "a.pt")
    assert told in run_failing(capsys, tmp_path / "a.pt", tmp_path / "o.pdparams")
    assert told in run_failing(capsys, tmp_path / "a.pt", tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def test_a_wrong_result_is_not_written(tmp_path, capsys, peer, monkeypatch):
    torch.save(peer.state_dict(), tmp_path / "a.pt")
    honest = convert_module.written_embedding
    monkeypatch.setattr(convert_module, "written_embedding", lambda *args: honest(*args) + 0.01)
    assert "differ by 0.01" in run_failing(capsys, tmp_path / "a.pt", tmp_path / "o.pdparams")
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def test_outputs_that_cannot_be(tmp_path, capsys, peer):
    torch.save(peer.state_dict(), tmp_path / "a.pt")
    assert "tools/export.py" in run_failing(capsys, tmp_path / "a.pt", tmp_path / "o.onnx")
    assert "is the source itself" in run_failing(capsys, tmp_path / "a.pt", tmp_path / "a.pt")
    convert_module.main([str(tmp_path / "a.pt"), str(tmp_path / "run")])
    assert "is the source itself" in run_failing(capsys, tmp_path / "run", tmp_path / "run")
    assert "no such file" in run_failing(capsys, tmp_path / "b.pt", tmp_path / "o.pdparams")
    assert "did you mean" in run_failing(capsys, tmp_path / "a.pt", tmp_path / "o.pdparams", "--network", "iresnet")
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    assert "holds a training run" in run_failing(capsys, tmp_path / "a.pt", tmp_path / "run")
    torch.save({"lr": 0.1}, tmp_path / "c.pt")
    assert "holds no named arrays; its keys are lr" in run_failing(capsys, tmp_path / "c.pt", tmp_path / "o.pdparams")


# --- checkpoints with class centres


def write_checkpoints(folder, peer, cuts=((0, 4), (4, 8), (8, 11))):
    """What the PyTorch reference saves for each rank with all states, momentum in the optimiser."""
    folder.mkdir()
    for rank, (start, stop) in enumerate(cuts):
        head = torch.nn.Module()
        head.weight = torch.nn.Parameter(torch.tensor(CENTRES[start:stop]))
        groups = [{"params": peer.parameters()}, {"params": head.parameters()}]
        optimizer = torch.optim.SGD(groups, lr=0.0, momentum=0.9)
        for parameter in peer.parameters():
            parameter.grad = torch.ones_like(parameter)
        head.weight.grad = torch.full_like(head.weight, rank + 1.0)
        optimizer.step()
        content = {
            "epoch": 1,
            "global_step": 9,
            "state_dict_backbone": peer.state_dict(),
            "state_dict_softmax_fc": head.state_dict(),
            "state_optimizer": optimizer.state_dict(),
            "state_lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2).state_dict(),
        }
        torch.save(content, folder / f"checkpoint_gpu_{rank}.pt")


def test_training_checkpoints_with_their_shards(tmp_path, capsys, peer):
    write_checkpoints(tmp_path / "ck", peer)
    for number, source in enumerate((tmp_path / "ck", tmp_path / "ck/checkpoint_gpu_1.pt")):
        out = tmp_path / f"out{number}"
        main([str(source), str(out)])
        head = read_head(out / "head.safetensors")
        np.testing.assert_array_equal(head["weight"], CENTRES)
        momentum = read_head(out / "head_momentum.safetensors")["weight"]
        np.testing.assert_array_equal(momentum[:, 0], [1] * 4 + [2] * 4 + [3] * 3)
        np.testing.assert_allclose(
            DynamicEngine(load_backbone(out)).run(batch()), embed_torch(peer, batch()), atol=1e-4
        )
    (tmp_path / "ck/checkpoint_gpu_1.pt").unlink()
    assert "rank 1 is missing" in run_failing(capsys, tmp_path / "ck", tmp_path / "out2")


def test_uneven_shards_are_refused(tmp_path, capsys, peer):
    write_checkpoints(tmp_path / "ck", peer, ((0, 3), (3, 8), (8, 11)))
    assert "shards of [3, 5, 3] rows; 11 classes on 3 ranks are cut as [4, 4, 3]" in run_failing(
        capsys, tmp_path / "ck", tmp_path / "out"
    )


def test_arcface_paddles_folder(tmp_path, capsys):
    """backbone.pdparams with its PReLU spelling, class centres and momentum as pickles of each rank."""
    layer = trained_like(width=8, embedding_size=32)
    old = {name.replace("prelu.weight", "prelu._weight"): value for name, value in state_of(layer).items()}
    assert any(name.endswith("prelu._weight") for name in old)
    source = tmp_path / "emore_arcface"
    source.mkdir()
    with open(source / "backbone.pdparams", "wb") as file:
        pickle.dump({**old, "StructuredToParameterName@@": {name: name for name in old}}, file, protocol=2)
    for rank, rows in enumerate((CENTRES[:6], CENTRES[6:])):
        for name, value in (("weight", rows), ("weight_mom", rows * 2)):
            with open(source / f"rank:{rank}_softmax_{name}.pkl", "wb") as file:
                pickle.dump(value, file)
    main([str(source), str(tmp_path / "out")])
    np.testing.assert_array_equal(read_head(tmp_path / "out")["weight"], CENTRES)
    np.testing.assert_array_equal(read_head(tmp_path / "out/head_momentum.safetensors")["weight"], CENTRES * 2)
    for name, value in read_state(tmp_path / "out/backbone.pdparams").items():
        np.testing.assert_array_equal(value, state_of(layer)[name])
    main([str(source / "rank:0_softmax_weight.pkl"), str(tmp_path / "centres.npy")])
    np.testing.assert_array_equal(np.load(tmp_path / "centres.npy"), CENTRES)
    main([str(tmp_path / "centres.npy"), str(tmp_path / "centres.pt")])
    np.testing.assert_array_equal(torch.load(tmp_path / "centres.pt", weights_only=True)["weight"].numpy(), CENTRES)


@pytest.mark.filterwarnings("ignore")
def test_initial_weights_from_a_run_its_checkpoint_and_onnx(tmp_path, peer):
    """init.backbone and init.head take a run folder, a checkpoint in it, and (backbone) an ONNX file."""
    from losses import build_margin
    from partial_fc import PartialFC
    from utils.run.checkpoint import CheckpointWriter, Snapshot
    from utils.weights.initial import load_initial

    trained = trained_like("iresnet18", width=8, embedding_size=32)
    writer = CheckpointWriter(tmp_path / "run", asynchronous=False)
    rows, shared = {"weight": CENTRES}, {"backbone": state_of(trained)}
    writer.start(Snapshot(step=3, rows=rows, row_start=0, table={}, shared=shared, meta={}))
    checkpoint = writer.finish(False)
    for place in (tmp_path / "run", checkpoint):
        layer = build_backbone("iresnet18", width=8, embedding_size=32)
        head = PartialFC(11, 32, build_margin("arcface"))
        load_initial(layer, head, str(place), str(place), freeze=())
        np.testing.assert_array_equal(head.weight.numpy(), CENTRES)
        for name, value in state_of(trained).items():
            np.testing.assert_array_equal(state_of(layer)[name], value)
    export_onnx(peer, tmp_path / "a.onnx")
    load_initial(layer, head, str(tmp_path / "a.onnx"), None, freeze=())
    layer.eval()
    close_float32(DynamicEngine(layer).run(batch()), embed_torch(peer, batch()))


# --- ONNX, names lost


def export_onnx(network, path, **options):
    arguments = {"opset_version": 13, "dynamo": False, "input_names": ["data"], "dynamic_axes": {"data": {0: "n"}}}
    torch.onnx.export(network, (torch.zeros(2, 3, 112, 112),), str(path), **{**arguments, **options})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("network", SMALL_PEERS)
def test_onnx_by_walking_the_graph(tmp_path, capsys, network):
    """The exporter folds the batch norms and numbers the tensors; the embeddings must come out the same."""
    net = randomise(PEERS[network](), num_images=4)
    export_onnx(net, tmp_path / "a.onnx")
    names = {tensor.name for tensor in onnx.load(str(tmp_path / "a.onnx")).graph.initializer}
    assert not names & {"bn1.running_mean", "layer1.0.bn2.weight", "layers.0.layers.1.weight"}
    main([str(tmp_path / "a.onnx"), str(tmp_path / "run")])
    assert "onnxruntime" in capsys.readouterr().out
    found = DynamicEngine(load_backbone(tmp_path / "run")).run(batch())
    close_float32(found, embed_torch(net, batch()))
    state = read_onnx(tmp_path / "a.onnx")
    wanted = {name for name in net.state_dict() if not name.endswith("num_batches_tracked")}
    assert set(state) == wanted and guess_network(state, True)["network"] == network


def with_pointwise_end(net, bias):
    """The twin with a 1x1 convolution in place of its last linear layer, as some exports have it."""
    linear = next(part for part in net.features.modules() if isinstance(part, torch.nn.Linear))
    norm = next(part for part in net.features.modules() if isinstance(part, torch.nn.BatchNorm1d))
    depthwise = next(iter(net.features.layers))
    pointwise = torch.nn.Conv2d(linear.in_features, linear.out_features, 1, bias=bias)
    pointwise.weight.data = linear.weight.data[:, :, None, None].clone()
    if bias:
        torch.nn.init.normal_(pointwise.bias)
    after = torch.nn.BatchNorm2d(norm.num_features)
    after.load_state_dict(norm.state_dict())
    net.features = torch.nn.Sequential(depthwise, pointwise, after, torch.nn.Flatten())
    return net.eval()


class Linear(torch.nn.Module):
    """A first stage without its activation."""

    def __init__(self, stage):
        super().__init__()
        self.layers = torch.nn.Sequential(*list(stage.layers)[:2])

    def forward(self, x):
        return self.layers(x)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("first", ["depthwise", "linear", "kept norms"])
def test_onnx_of_a_small_mobilefacenet_that_ends_in_a_pointwise_convolution(tmp_path, bias, first):
    net = with_pointwise_end(randomise(PEERS["mobilefacenet_small"](), num_images=4), bias)
    if first == "linear":
        net.layers[1] = Linear(net.layers[1])
    kept = {"training": torch.onnx.TrainingMode.PRESERVE, "do_constant_folding": False} if first == "kept norms" else {}
    export_onnx(net, tmp_path / "a.onnx", **kept)
    expected = OnnxEngine(tmp_path / "a.onnx").run(batch())
    state = read_onnx(tmp_path / "a.onnx")
    told = guess_network(state, True)
    assert told == {"network": "mobilefacenet_small", "embedding_size": 32, "width": 8}
    layer = build_backbone("mobilefacenet_small", embedding_size=32, width=8)
    load_state(layer, state, "a.onnx", from_torch=True)
    layer.eval()
    found = DynamicEngine(layer).run(batch())
    np.testing.assert_allclose(found, expected, atol=1e-5 * max(1, abs(expected).max()))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("source", ["ours", "twin", "linear twin"])
def test_the_small_mobilefacenet_in_full_size_there_and_back(tmp_path, source):
    """Width 64, 512-d: exported, converted by the command, unit embeddings as onnxruntime has them to 1e-5."""
    if source == "ours":
        layer = trained_like("mobilefacenet_small", embedding_size=512)
        export(layer, tmp_path, formats=("onnx",), batches=(1,))
    else:
        net = with_pointwise_end(randomise(MobileFaceNet((1, 4, 6, 2), 2.0, 64, 512), num_images=4), bias=True)
        if source == "linear twin":
            net.layers[1] = Linear(net.layers[1])
        export_onnx(net, tmp_path / "model.onnx")
    main([str(tmp_path / "model.onnx"), str(tmp_path / "run")])
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["model"]["network"] == "mobilefacenet_small"
    embeddings = [
        engine.run(batch(4)).astype(np.float64)
        for engine in (OnnxEngine(tmp_path / "model.onnx"), DynamicEngine(load_backbone(tmp_path / "run")))
    ]
    expected, found = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in embeddings)
    assert expected.shape == (4, 512)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_another_first_stage_is_refused_by_node(tmp_path, capsys):
    net = PEERS["mobilefacenet_small"]().eval()
    net.layers[1].layers[0] = torch.nn.Conv2d(8, 8, 3, 1, 1, groups=2, bias=False)
    export_onnx(net, tmp_path / "a.onnx")
    told = run_failing(capsys, tmp_path / "a.onnx", tmp_path / "o.pdparams")
    assert "of shape [8, 4, 3, 3] as the first stage" in told and "Conv" in told


@pytest.mark.filterwarnings("ignore")
def test_onnx_whose_batch_norms_are_still_there(tmp_path, peer):
    """Exported in a mode that keeps them: the state comes back as it was."""
    export_onnx(peer, tmp_path / "a.onnx", training=torch.onnx.TrainingMode.PRESERVE, do_constant_folding=False)
    model = onnx.load(str(tmp_path / "a.onnx"))
    assert sum(node.op_type == "BatchNormalization" for node in model.graph.node) >= 10
    state = read_onnx(tmp_path / "a.onnx")
    layer = build_backbone("iresnet18", width=8, embedding_size=32)
    load_state(layer, state, "a.onnx", from_torch=True)
    layer.eval()
    np.testing.assert_allclose(DynamicEngine(layer).run(batch()), embed_torch(peer, batch()), atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_onnx_that_scales_pixels_itself(tmp_path, peer):
    """(x - 127.5) / 128 inside the graph: the factor goes into the first convolution, the embedder gives pixels."""
    export_onnx(peer, tmp_path / "a.onnx")
    model = onnx.load(str(tmp_path / "a.onnx"))
    first = next(node for node in model.graph.node if "data" in node.input)
    first.input[list(first.input).index("data")] = "scaled"
    for name, value in (("mean", 127.5), ("factor", 1 / 128)):
        model.graph.initializer.append(numpy_helper.from_array(np.array([value], np.float32), name))
    model.graph.node.insert(0, helper.make_node("Mul", ["centred", "factor"], ["scaled"]))
    model.graph.node.insert(0, helper.make_node("Sub", ["data", "mean"], ["centred"]))
    onnx.save(model, str(tmp_path / "raw.onnx"))
    images = pictures(2)
    pixel = images.transpose(0, 3, 1, 2).astype(np.float32)
    expected = embed_torch(peer, (pixel - 127.5) / 128)
    np.testing.assert_allclose(load_embedder(tmp_path / "raw.onnx")(images), expected, atol=1e-4)
    np.testing.assert_allclose(load_embedder(tmp_path / "raw.onnx", engine="dynamic")(images), expected, atol=1e-4)


def test_onnx_of_something_else_is_refused(tmp_path, capsys):
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(48400, 8))
    with pytest.warns():
        export_onnx(net.eval(), tmp_path / "a.onnx")
    error = run_failing(capsys, tmp_path / "a.onnx", tmp_path / "o.pdparams")
    assert "expected PRelu after" in error and "found Relu" in error
    (tmp_path / "b.onnx").write_bytes(b"\x00no protobuf at all")
    assert "not an ONNX file" in run_failing(capsys, tmp_path / "b.onnx", tmp_path / "o.pdparams")


class Around(torch.nn.Module):
    """A network between a layout or type of its own at the input and one at the output."""

    def __init__(self, network, before, after):
        super().__init__()
        self.network, self.before, self.after = network, before, after

    def forward(self, image):
        return self.after(self.network(self.before(image)))


AROUND = {
    "[B, D, 1, 1]": ((2, 3, 112, 112), torch.float32, lambda x: x, lambda y: y[:, :, None, None]),
    "[B, H, W, 3]": ((2, 112, 112, 3), torch.float32, lambda x: x.permute(0, 3, 1, 2), lambda y: y),
    "uint8": ((2, 3, 112, 112), torch.uint8, lambda x: (x.float() - 127.5) / 127.5, lambda y: y),
    "float16": ((2, 3, 112, 112), torch.float16, lambda x: x.float(), lambda y: y.half()),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", AROUND)
def test_onnx_of_other_layouts_and_types(tmp_path, capsys, peer, kind):
    """They become the same weights as the plain export's."""
    shape, dtype, before, after = AROUND[kind]
    names = {"opset_version": 13, "dynamo": False, "input_names": ["data"]}
    inputs = (torch.zeros(shape, dtype=dtype),)
    torch.onnx.export(Around(peer, before, after).eval(), inputs, str(tmp_path / "a.onnx"), **names)
    main([str(tmp_path / "a.onnx"), str(tmp_path / "a.pt")])
    assert "wrote" in capsys.readouterr().out
    export_onnx(peer, tmp_path / "b.onnx")
    found, expected = read_state(tmp_path / "a.pt"), read_onnx(tmp_path / "b.onnx")
    assert expected.keys() <= found.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.filterwarnings("ignore")
def test_onnx_of_four_channels_and_what_is_no_onnx(tmp_path, capsys, peer):
    shape = (torch.zeros(2, 4, 112, 112),)
    around = Around(peer, lambda x: x[:, :3], lambda y: y)
    torch.onnx.export(around.eval(), shape, str(tmp_path / "a.onnx"), dynamo=False)
    assert "4 channels; RGB (3) or grey (1) is needed" in run_failing(capsys, tmp_path / "a.onnx", tmp_path / "o.pt")
    (tmp_path / "b.onnx").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "is a git-LFS pointer" in run_failing(capsys, tmp_path / "b.onnx", tmp_path / "o.pt")


def test_engine_of_an_onnx_file_names_what_it_cannot_take(tmp_path):
    (tmp_path / "b.onnx").write_bytes(b"\x00no protobuf at all")
    with pytest.raises(UserError, match="not an ONNX file that can be read"):
        load_embedder(tmp_path / "b.onnx")
    assert OnnxEngine.name == "onnx"


# --- checkpoints of trainers, with objects of their own beside the weights


def lightning(peer, path: Path, **extra) -> dict:
    """What such a trainer saves: the state under a prefix, and paths, arguments, sets and a bomb beside it."""
    foreign = {
        "callbacks": {"best": {"folder": path.parent, "seen": {1, 2}, ("a", 1): frozenset("ab")}},
        "hyper_parameters": {"args": argparse.Namespace(lr=0.1, sizes=[1, 2]), "lists": defaultdict(list, a=[1])},
        "dtype": torch.float16,
        "device": torch.device("cpu"),
        "bomb": Bomb(path.parent / "ran"),
    }
    return {"state_dict": {f"model.{name}": value for name, value in peer.state_dict().items()}, **foreign, **extra}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "stream"])
def test_foreign_objects_beside_the_weights_are_passed_over(tmp_path, peer, zipped):
    """They are neither made nor run; the weights are those of the bare state."""
    path = tmp_path / "epoch=3.ckpt"
    torch.save(lightning(peer, path), path, _use_new_zipfile_serialization=zipped)
    torch.save(peer.state_dict() | {"args": argparse.Namespace(lr=0.1)}, tmp_path / "bare.pt")
    found, expected = read_state(path), read_state(tmp_path / "bare.pt")
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in expected)
    assert not (tmp_path / "ran").exists()


def test_a_weight_that_is_foreign_is_refused_by_name(tmp_path, peer):
    """What the weights themselves need cannot be passed over."""
    state = peer.state_dict()
    state["conv1.weight"] = state["conv1.weight"].to_sparse()
    torch.save({"state_dict": state}, tmp_path / "a.ckpt")
    with pytest.raises(UserError, match=r"conv1\.weight is a torch\._utils\._rebuild_sparse_tensor"):
        read_state(tmp_path / "a.ckpt")
    state["conv1.weight"] = Bomb(tmp_path / "ran")
    torch.save(state, tmp_path / "b.pth")
    with pytest.raises(UserError, match=r"b\.pth: conv1\.weight is a (posix|nt)\.system, .* not executed"):
        read_state(tmp_path / "b.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("weight", ["text", Bomb("ran"), {"a": 1}])
def test_class_centres_that_are_no_tensor(tmp_path, weight):
    torch.save({"weight": weight}, tmp_path / "head.pt")
    with pytest.raises(UserError, match=r"class centres .* expected, found nothing"):
        read_head(tmp_path / "head.pt")
