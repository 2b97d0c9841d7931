"""eval/embed.py, eval/engines.py, eval/stream.py: one result from every engine, streaming, resuming, ranks."""

import numpy as np
import paddle
import pytest
import yaml

from backbones import build_backbone
from eval import choose_engine, embed
from eval.embed import infer, load_backbone, load_embedder, model_options
from eval.stream import digest, embed_to_file
from tests.ranks import run_ranks
from tools.numpy_forward import reference_embedding
from utils.errors import UserError
from utils.weights.states import save_pdparams

NETWORK = {"network": "iresnet18", "width": 8, "embedding_size": 32}


def trained_like(network="iresnet18", seed=0, **options):
    """A small backbone whose batch norms have seen data, so that embeddings are of ordinary size."""
    paddle.seed(seed)
    layer = build_backbone(network, **options)
    norms = [part for part in layer.sublayers() if isinstance(part, paddle.nn.layer.norm._BatchNormBase)]
    kept = [norm._momentum for norm in norms]
    for norm in norms:
        norm._momentum = 0.0
    layer.train()
    with paddle.no_grad():
        layer(paddle.rand([8, 3, layer.input_size, layer.input_size]) * 2 - 1)
    for norm, momentum in zip(norms, kept, strict=True):
        norm._momentum = momentum
    layer.eval()
    return layer


def state_of(layer):
    return {name: tensor.numpy() for name, tensor in layer.state_dict().items()}


def pictures(count, size=112, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def layer():
    return trained_like(width=8, embedding_size=32)


@pytest.fixture(scope="module")
def run_dir(layer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    save_pdparams(folder / "backbone.pdparams", state_of(layer))
    best = {name: value * 1.01 if name == "fc.weight" else value for name, value in state_of(layer).items()}
    save_pdparams(folder / "backbone_best.pdparams", best)
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": {**NETWORK, "dropout": 0.4, "recompute": None}}))
    return folder


def expected_embedding(layer, images, flip=False):
    """float64 numpy, from the state alone."""
    images = images[:, :, ::-1] if flip else images
    image_BCHW = (images.transpose(0, 3, 1, 2) / 255 - 0.5) / 0.5
    return reference_embedding(state_of(layer), False, image_BCHW)


class Pixels(paddle.nn.Layer):
    """An 'embedding' that is the input itself, to see what a network is given."""

    input_size, embedding_size = 4, 48

    def __init__(self):
        super().__init__()
        self.scale = self.create_parameter([1], default_initializer=paddle.nn.initializer.Constant(1.0))

    def forward(self, image):
        return (image * self.scale).flatten(1)


@pytest.mark.oldest
def test_the_network_sees_rgb_in_minus_one_to_one():
    images = pictures(3, 4)
    found = load_embedder(Pixels())(images)
    assert found.dtype == np.float32
    expected = ((images / 255 - 0.5) / 0.5).transpose(0, 3, 1, 2).reshape(3, -1)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    mirrored = load_embedder(Pixels())(images, flip=True).reshape(3, 3, 4, 4)
    np.testing.assert_allclose(mirrored, found.reshape(3, 3, 4, 4)[..., ::-1], atol=0)


OLDEST = [pytest.param(engine, marks=pytest.mark.oldest) for engine in ("dynamic", "static", "predictor")]


@pytest.mark.parametrize("engine", [*OLDEST, "onnx", "openvino"])
def test_every_engine_gives_the_embedding(engine, run_dir, layer):
    """Against float64 numpy; more images than a batch and a last batch that is smaller."""
    images = pictures(7)
    embedder = load_embedder(run_dir, engine=engine, batch_size=3)
    assert (embedder.engine, embedder.embedding_size, embedder.input_size) == (engine, 32, 112)
    found = embedder(images)
    np.testing.assert_allclose(found, expected_embedding(layer, images), atol=1e-4)
    np.testing.assert_allclose(embedder(images[:2], flip=True), expected_embedding(layer, images[:2], True), atol=1e-4)
    assert embedder(images[:0]).shape == (0, 32)
    np.testing.assert_allclose(embedder(images[:1]), found[:1], atol=1e-4)
    np.testing.assert_array_equal(images, pictures(7))


SMALL = {
    "mobilefacenet": {"width": 16, "embedding_size": 32},
    "mobilefacenet_large": {"width": 16, "embedding_size": 32},
    "vit_t": {"width": 64, "embedding_size": 32},
    "resnet18": {"width": 8, "input_size": 64, "se": True, "pool": "flatten"},
    "resnet50": {"width": 8, "input_size": 64},
    "resnet_face18": {"width": 8, "embedding_size": 32},
    "mnist_2d": {},
}


@pytest.mark.slow
@pytest.mark.parametrize("network", SMALL)
def test_engines_agree_for_every_family(network):
    layer = trained_like(network, **SMALL[network])
    images = pictures(5, layer.input_size)
    expected = load_embedder(layer)(images)
    tolerance = 1e-4 * max(1, abs(expected).max())  # resnet50: the dynamic graph is 1.2e-4 off float64 at values of 5
    for engine in ("static", "predictor", "onnx", "openvino"):
        np.testing.assert_allclose(load_embedder(layer, engine=engine)(images), expected, atol=tolerance)


@pytest.mark.oldest
def test_a_layer_keeps_its_mode_and_its_later_weights(layer):
    layer = trained_like(width=8, embedding_size=32)
    layer.train()
    layer.bn1.eval()
    modes = [part.training for part in layer.sublayers(include_self=True)]
    mean_before = layer.bn2._mean.numpy().copy()
    for engine in ("auto", "static", "predictor"):
        embedder = load_embedder(layer, engine=engine)
        assert embedder.engine == ("dynamic" if engine == "auto" else engine)
        found = embedder(pictures(2))
        np.testing.assert_allclose(found, expected_embedding(layer, pictures(2)), atol=1e-4)
        assert [part.training for part in layer.sublayers(include_self=True)] == modes
    np.testing.assert_array_equal(layer.bn2._mean.numpy(), mean_before)
    for engine in ("dynamic", "static"):
        embedder = load_embedder(layer, engine=engine)
        before = embedder(pictures(2))
        layer.features.bias.set_value(layer.features.bias + 1.0)
        np.testing.assert_allclose(embedder(pictures(2)), before + 1.0, atol=1e-4)


MANY_PROGRAMS = """
import numpy as np
import paddle
from eval.engines import StaticEngine
image = np.random.default_rng(0).standard_normal([2, 3, 8, 8]).astype("float32")
for _ in range(40):
    parts = [part for _ in range(4) for part in (paddle.nn.Conv2D(3, 3, 3, padding=1), paddle.nn.BatchNorm2D(3))]
    layer = paddle.nn.Sequential(*parts)
    layer.eval()
    layer.input_size = 8
    with paddle.no_grad():
        expected = layer(paddle.to_tensor(image)).numpy()
    np.testing.assert_allclose(StaticEngine(layer).run(image), expected, atol=1e-4)
print("all right")
"""


@pytest.mark.oldest
def test_many_compiled_programs_that_end_in_a_batch_norm_live_in_one_process():
    """Without the copy at the end Paddle 3.3 crashes here (a process of its own, for that reason)."""
    assert "all right" in run_ranks(MANY_PROGRAMS, 1)[0]


def test_an_error_inside_restores_the_mode():
    layer = Pixels()
    layer.train()
    layer.forward = lambda image: 1 / 0
    with pytest.raises(ZeroDivisionError):
        load_embedder(layer)(pictures(1, 4))
    assert layer.training


@pytest.mark.parametrize(
    ("images", "shown"),
    [
        (np.zeros((2, 112, 112, 3), np.float32), "float32"),
        (np.zeros((2, 3, 112, 112), np.uint8), "[2, 3, 112, 112]"),
        (np.zeros((112, 112, 3), np.uint8), "[112, 112, 3]"),
        (np.zeros((2, 96, 112, 3), np.uint8), "[2, 96, 112, 3]"),
    ],
)
def test_wrong_images_are_named(layer, images, shown):
    with pytest.raises(ValueError, match="expected uint8") as caught:
        load_embedder(layer)(images)
    assert shown in str(caught.value)


@pytest.fixture
def on_intel(monkeypatch):
    """Where ``auto`` knows its order beforehand, whatever runs the tests."""
    monkeypatch.setattr(choose_engine, "processor", lambda: ("GenuineIntel", frozenset()))


@pytest.mark.usefixtures("on_intel")
def test_auto_takes_the_fastest_and_tells_what_does_not_run(run_dir, monkeypatch, capfd):
    assert load_embedder(run_dir).engine == "openvino"
    told = capfd.readouterr().err
    assert "engine openvino: openvino 20" in told and "threads" in told and "cannot run" not in told

    def broken(*_):
        raise RuntimeError("no such instruction")

    for engine in ("openvino", "predictor"):
        monkeypatch.setitem(embed.BUILDERS, engine, broken)
    monkeypatch.setitem(embed.BUILDERS, "onnx", broken)
    assert load_embedder(run_dir).engine == "static"
    told = capfd.readouterr().err
    assert "no such instruction" in told
    assert all(f"trying {engine}" in told for engine in ("predictor", "onnx", "static"))
    with pytest.raises(UserError, match=r"'predictor' cannot run here.*no such instruction"):
        load_embedder(run_dir, engine="predictor")
    with pytest.raises(UserError, match="engine 'fast': choose auto"):
        load_embedder(run_dir, engine="fast")


def test_last_and_best_of_a_run(run_dir):
    last, best = (load_backbone(run_dir, which=which) for which in ("last", "best"))
    np.testing.assert_allclose(best.fc.weight.numpy(), last.fc.weight.numpy() * 1.01, rtol=1e-6)
    assert not last.training
    with pytest.raises(UserError, match="choose last or best"):
        load_backbone(run_dir, which="first")


def test_weights_alone_tell_their_network(run_dir, tmp_path, layer):
    """Width and embedding size are read from the tensors; a name that does not fit is refused strictly."""
    weights = tmp_path / "weights.pdparams"
    weights.write_bytes((run_dir / "backbone.pdparams").read_bytes())
    images = pictures(2)
    for network in (None, "iresnet18", "r18"):
        found = load_embedder(weights, network, engine="dynamic")(images)
        np.testing.assert_allclose(found, expected_embedding(layer, images), atol=1e-4)
    with pytest.raises(UserError, match=r"does not fit IResNet: missing: layer1\.2\.bn1\.weight"):
        load_embedder(weights, "iresnet34", engine="dynamic")
    with pytest.raises(UserError, match="did you mean 'iresnet50'"):
        load_embedder(weights, "iresnet5", engine="dynamic")
    with pytest.raises(UserError, match="no such weights file"):
        load_embedder(tmp_path / "absent.pdparams")
    (tmp_path / "config.yaml").write_text("run: {}\n")
    with pytest.raises(UserError, match=r"config\.yaml: no model\.network"):
        load_embedder(weights)


def pixel_graph(path, batch, raw=False, size=4):
    """An ONNX file that hands out its input (scaled inside if ``raw``), for a fixed or free batch."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    image = helper.make_tensor_value_info("data", TensorProto.FLOAT, [batch, 3, size, size])
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, [batch, 3 * size * size])
    nodes, value, constants = [], "data", []
    if raw:
        constants = [
            numpy_helper.from_array(np.array([127.5], np.float32), "m"),
            numpy_helper.from_array(np.array([1 / 127.5], np.float32), "k"),
        ]
        nodes = [helper.make_node("Sub", ["data", "m"], ["a"]), helper.make_node("Mul", ["a", "k"], ["b"])]
        value = "b"
    nodes.append(helper.make_node("Flatten", [value], ["out"], axis=1))
    graph = helper.make_graph(nodes, "g", [image], [out], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), str(path))


@pytest.mark.parametrize("batch", ["n", 2])
@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.usefixtures("on_intel")
def test_onnx_files_of_others(tmp_path, batch, raw):
    """A fixed batch is filled up; a graph that scales pixels by itself is given pixels."""
    pixel_graph(tmp_path / "net.onnx", batch, raw)
    images = pictures(5, 4)
    expected = (images / 127.5 - 1).transpose(0, 3, 1, 2).reshape(5, -1)
    for engine in ("auto", "onnx"):
        embedder = load_embedder(tmp_path / "net.onnx", engine=engine, batch_size=3)
        assert embedder.engine == {"auto": "openvino", "onnx": "onnx"}[engine]
        assert (embedder.input_size, embedder.embedding_size) == (4, 48)
        np.testing.assert_allclose(embedder(images), expected, atol=1e-5)


def test_infer_as_mindface_has_it(run_dir, tmp_path, layer):
    import cv2

    image = pictures(1)[0]
    cv2.imwrite(str(tmp_path / "face.png"), image[..., ::-1])
    weights = str(run_dir / "backbone.pdparams")
    from_file = infer(tmp_path / "face.png", backbone="iresnet18", pretrained=weights)
    assert from_file.shape == (1, 32)
    np.testing.assert_allclose(from_file, expected_embedding(layer, image[None]), atol=1e-4)
    both = infer(pictures(2), backbone="iresnet18", pretrained=weights, num_features=32, flip=True)
    expected = expected_embedding(layer, pictures(2)) + expected_embedding(layer, pictures(2), True)
    np.testing.assert_allclose(both, expected, atol=2e-4)
    with pytest.raises(UserError, match="num_features=512"):
        infer(image, backbone="iresnet18", pretrained=weights, num_features=512)
    with pytest.raises(UserError, match="name the weights"):
        infer(image, backbone="iresnet18")


class Source:
    """Images that count how often they are read, and fail where they are told."""

    def __init__(self, images, fail_at=None):
        self.images, self.fail_at, self.reads, self.given = images, fail_at, [], 0

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        if index == self.fail_at:
            raise UserError(f"image {index} is damaged")
        self.reads.append(index)
        return self.images[index]


@pytest.mark.oldest
def test_a_stream_is_the_call_and_resumes(tmp_path):
    images = pictures(23, 4)
    embedder = load_embedder(Pixels(), batch_size=5)
    expected = embedder(images) + embedder(images, flip=True)
    output = tmp_path / "sub" / "out.npy"
    options = {"flip": "add", "chunk": 4, "key": "photos", "show_progress": False}
    with pytest.raises(UserError, match="image 13 is damaged"):
        embed_to_file(embedder, Source(images, fail_at=13), output, **options)
    assert not output.exists()
    source = Source(images)
    np.testing.assert_array_equal(embed_to_file(embedder, source, output, **options), expected)
    assert sorted(source.reads) == list(range(12, 23))  # three chunks of four were done
    assert [path.name for path in output.parent.iterdir()] == ["out.npy"]
    np.testing.assert_array_equal(np.load(output), expected)


@pytest.mark.parametrize("change", ["key", "flip", "chunk", "weights"])
def test_a_partial_file_of_other_work_is_not_continued(tmp_path, change):
    images = pictures(12, 4)
    layer = Pixels()
    options = {"flip": "none", "chunk": 4, "key": "a", "show_progress": False}
    with pytest.raises(UserError):
        embed_to_file(load_embedder(layer), Source(images, fail_at=9), tmp_path / "o.npy", **options)
    assert (tmp_path / "o.npy.part").exists()
    if change == "weights":
        layer.scale.set_value(layer.scale * 2)
    else:
        options[change] = {"key": "b", "flip": "add", "chunk": 3}[change]
    source = Source(images)
    embed_to_file(load_embedder(layer), source, tmp_path / "o.npy", **options)
    assert sorted(source.reads) == list(range(12))


def test_a_stream_holds_two_chunks_at_most(tmp_path):
    """Flat memory: when a chunk is embedded, no more than the next one has been read."""
    source = Source(pictures(60, 4))
    inner = load_embedder(Pixels())
    ahead, done = [], 0

    class Watching:
        embedding_size, identity = inner.embedding_size, inner.identity

        def __call__(self, images, flip=False):
            nonlocal done
            done += len(images)
            ahead.append(len(source.reads) - done)
            return inner(images, flip)

    embed_to_file(Watching(), source, tmp_path / "o.npy", chunk=5, show_progress=False)
    assert max(ahead) <= 5


def test_a_stream_that_fails_at_once_leaves_nothing(tmp_path):
    with pytest.raises(UserError):
        embed_to_file(load_embedder(Pixels()), Source(pictures(3, 4), fail_at=0), tmp_path / "o.npy")
    assert list(tmp_path.iterdir()) == []
    empty = embed_to_file(load_embedder(Pixels()), Source(pictures(0, 4)), tmp_path / "o.npy")
    assert empty.shape == (0, 48)
    with pytest.raises(ValueError, match="flip 'concat'"):
        embed_to_file(load_embedder(Pixels()), Source(pictures(3, 4)), tmp_path / "o.npy", flip="concat")


def test_digest_depends_on_order_and_borders():
    assert len({digest(parts) for parts in (["ab", "c"], ["a", "bc"], ["c", "ab"], ["ab", "c", ""])}) == 4


RANKS = """
import sys
import numpy as np
from tests.test_embed import Pixels, Source, pictures
from eval.embed import load_embedder
from eval.stream import embed_to_file
from utils import distributed
distributed.init("cpu")
fail_at = int(sys.argv[2]) if distributed.get_rank() == 1 else None
source = Source(pictures(30, 4), fail_at=fail_at if fail_at and fail_at >= 0 else None)
try:
    rows = embed_to_file(load_embedder(Pixels()), source, sys.argv[1], chunk=4, show_progress=False)
    print("rows", rows.shape, "read", len(source.reads))
except ValueError as error:
    print("failed:", error)
"""


@pytest.mark.distributed
def test_ranks_share_a_stream_and_fail_together(tmp_path):
    """One rank's damaged image ends the run on both; what is done is kept, at another world size too."""
    output = tmp_path / "o.npy"
    first = run_ranks(RANKS, 2, args=(output, 20))
    assert "failed: image 20 is damaged" in first[1]
    assert "failed: rank 1 failed: image 20 is damaged" in first[0]
    assert not output.exists()
    second = run_ranks(RANKS, 2, args=(output, -1))
    reads = [int(text.split("read ")[1].split()[0]) for text in second]
    assert 0 < sum(reads) < 30
    np.testing.assert_array_equal(np.load(output), load_embedder(Pixels())(pictures(30, 4)))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"\tmodel: [", "no valid YAML"),
        (b"[1, 2]", "where settings were expected"),
        (b"text", "where settings were expected"),
        (b"model: 5", "where settings were expected"),
        (b"model: {width: 8}", "no model.network"),
        (b"model: " + b"[" * 3000, "no valid YAML"),
        (b"model: \xff\xff", "neither UTF-8 nor GBK"),
    ],
)
def test_the_configuration_beside_weights_may_be_anything(tmp_path, content, told):
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(UserError, match=f"config.yaml: .*{told}"):
        model_options(tmp_path)


def test_the_configuration_beside_weights_in_utf16(tmp_path):
    (tmp_path / "config.yaml").write_bytes("model: {network: iresnet18}".encode("utf-16"))
    assert model_options(tmp_path) == {"network": "iresnet18"}


@pytest.mark.parametrize("options", [{"width": "x"}, {"input_size": -5}, {"embedding_size": 1.5}])
def test_sizes_that_are_none(options):
    ((name, value),) = options.items()
    with pytest.raises(UserError, match=f"{name} {value!r}: a whole number"):
        build_backbone("iresnet18", **options)
