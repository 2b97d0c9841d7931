"""eval/openvino_engine.py, network_input.py, choose_engine.py, kept.py: pixels, files kept, precision, devices."""

import re

import numpy as np
import onnx
import paddle
import pytest
from onnx import TensorProto, helper, numpy_helper

from eval import choose_engine, embed, engines, kept, openvino_engine
from eval.embed import CHECKED_IMAGES, load_embedder
from eval.engines import OnnxEngine, PredictorEngine
from eval.openvino_engine import OpenvinoEngine
from eval.stream import embed_to_file
from tests.test_embed import Pixels, Source, pictures, state_of, trained_like
from utils.errors import UserError
from utils.weights.states import save_pdparams

SIZE = 4


def write_graph(path, *, shape=("n", 3, SIZE, SIZE), dtype=TensorProto.FLOAT, arithmetic=(), tail=None, more=()):
    """An ONNX network that hands out its input as float32, channels first, after ``arithmetic`` [(operation, number)].

    ``tail``: shape of the output's axes behind the batch; ``more``: further outputs (the input as it is).
    """
    nodes, constants, value = [], [], "data"

    def add(kind, *inputs, **attributes):
        nodes.append(helper.make_node(kind, [value, *inputs], [f"v{len(nodes)}"], **attributes))
        return nodes[-1].output[0]

    if dtype != TensorProto.FLOAT:
        value = add("Cast", to=TensorProto.FLOAT)
    for position, (kind, number) in enumerate(arithmetic):
        constants.append(numpy_helper.from_array(np.float32(number), f"c{position}"))
        value = add(kind, f"c{position}")
    if shape[3] in (1, 3):
        value = add("Transpose", perm=[0, 3, 1, 2])
    value = add("Flatten", axis=1)
    if tail is not None:
        constants.append(numpy_helper.from_array(np.array([0, *tail]), "tail"))
        value = add("Reshape", "tail")
    outputs = [helper.make_tensor_value_info(value, TensorProto.FLOAT, None)]
    outputs += [helper.make_tensor_value_info(name, dtype, list(shape)) for name in more]
    nodes += [helper.make_node("Identity", ["data"], [name]) for name in more]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("data", dtype, list(shape))], outputs, constants
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.save(onnx.shape_inference.infer_shapes(model), str(path))
    return path


LAST = ("n", SIZE, SIZE, 3)
HALF, BYTES, DOUBLE = TensorProto.FLOAT16, TensorProto.UINT8, TensorProto.DOUBLE
GRAPHS = {  # the graph, and what its network is given for pixels 0 ... 255, as k * pixel + b
    "plain": ({}, (1 / 127.5, -1)),
    "one_by_one": ({"tail": (48, 1, 1)}, (1 / 127.5, -1)),
    "half": ({"dtype": HALF}, (1 / 127.5, -1)),
    "double": ({"dtype": DOUBLE}, (1 / 127.5, -1)),
    "bytes": ({"dtype": BYTES}, (1, 0)),
    "channels_last": ({"shape": LAST}, (1 / 127.5, -1)),
    "channels_last_bytes": ({"shape": LAST, "dtype": BYTES, "arithmetic": [("Mul", 1 / 128), ("Sub", 1)]}, (1, 0)),
    "fixed_batch": ({"shape": (4, 3, SIZE, SIZE)}, (1 / 127.5, -1)),
    "insightface": ({"arithmetic": [("Sub", 127.5), ("Mul", 1 / 128)]}, (1, 0)),
    "mean_alone": ({"arithmetic": [("Sub", 127.5)]}, (1, 0)),
    "divided": ({"arithmetic": [("Div", 255)]}, (1, 0)),
    "unit": ({"arithmetic": [("Sub", 0.5), ("Div", 0.5)]}, (1 / 255, 0)),
    "imagenet": ({"arithmetic": [("Sub", 0.449), ("Div", 0.226)]}, (1 / 255, 0)),
    "undone": ({"arithmetic": [("Add", 1), ("Mul", 127.5), ("Sub", 127.5), ("Mul", 1 / 128)]}, (1 / 127.5, -1)),
    "two_outputs": ({"more": ["map"]}, (1 / 127.5, -1)),
}


@pytest.mark.parametrize("engine", ["openvino", "onnx"])
@pytest.mark.parametrize("name", GRAPHS)
def test_onnx_networks_get_the_pixels_they_ask_for(tmp_path, name, engine):
    """The file hands out what it computes: the pixels in the range it was made for, then its own arithmetic."""
    settings, (scale, shift) = GRAPHS[name]
    embedder = load_embedder(write_graph(tmp_path / "net.onnx", **settings), engine=engine, batch_size=3)
    assert (embedder.engine, embedder.input_size, embedder.embedding_size) == (engine, SIZE, 48)
    images = pictures(7, SIZE)
    for flip, view in ((False, images), (True, images[:, :, ::-1])):
        expected = view.transpose(0, 3, 1, 2).reshape(7, -1).astype(np.float64) * scale + shift
        for kind, number in settings.get("arithmetic", ()):
            expected = {"Sub": np.subtract, "Add": np.add, "Mul": np.multiply, "Div": np.divide}[kind](expected, number)
        tolerance = 1e-3 if name == "half" else 1e-5
        np.testing.assert_allclose(embedder(images, flip=flip), expected, atol=tolerance, rtol=1e-5)
        np.testing.assert_allclose(embedder.start(images, "both").result()[:, int(flip)], expected, atol=tolerance,
                                   rtol=1e-5)  # fmt: skip
    np.testing.assert_array_equal(images, pictures(7, SIZE))


def test_grey_networks_get_the_luma(tmp_path):
    images = pictures(3, SIZE)
    expected = (images @ np.array([0.299, 0.587, 0.114])).reshape(3, -1) / 127.5 - 1
    for engine in ("openvino", "onnx"):
        embedder = load_embedder(write_graph(tmp_path / "net.onnx", shape=("n", 1, SIZE, SIZE)), engine=engine)
        np.testing.assert_allclose(embedder(images), expected, atol=0.5 / 127.5 + 1e-5)  # rounded to a whole grey value


@pytest.mark.parametrize(
    ("settings", "shown"),
    [
        ({"shape": ("n", 4, SIZE, SIZE)}, "4 channels; RGB (3) or grey (1)"),
        ({"shape": ("n", SIZE, SIZE, 4)}, "4 channels; RGB (3) or grey (1)"),
        ({"shape": ("n", 3, SIZE, SIZE + 1)}, "square images"),
        ({"dtype": TensorProto.INT32}, "type INT32"),
        ({"arithmetic": [("Mul", 1e-6)]}, "fits neither"),
        ({"more": ["map", "other"], "tail": (12, 2, 2)}, "exactly one of shape [batch, size]"),
        ({"tail": (12, 2, 2)}, "no embedding of each"),
    ],
)
@pytest.mark.parametrize("engine", ["auto", "onnx", "openvino"])
def test_onnx_networks_that_are_none(tmp_path, settings, shown, engine):
    path = write_graph(tmp_path / "net.onnx", **settings)
    with pytest.raises(UserError) as caught:
        load_embedder(path, engine=engine)
    assert shown in str(caught.value) and "net.onnx" in str(caught.value)


@pytest.fixture(autouse=True)
def on_intel(monkeypatch):
    """Where ``auto`` knows its order beforehand, whatever runs the tests."""
    monkeypatch.setattr(choose_engine, "processor", lambda: ("GenuineIntel", frozenset()))


@pytest.fixture(scope="module")
def layer():
    return trained_like(width=8, embedding_size=32)


@pytest.fixture
def weights(layer, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "run").mkdir()
    save_pdparams(tmp_path / "run" / "backbone.pdparams", state_of(layer))
    return tmp_path / "run" / "backbone.pdparams"


def test_pieces_give_what_single_images_give(weights):
    """Every way to cut a call: full pieces, remainders, one image, mirror images beside them."""
    images = pictures(37)
    embedder = load_embedder(weights, engine="openvino", num_threads=2)
    one = np.concatenate([embedder(images[i : i + 1]) for i in range(37)])
    mirrored = np.concatenate([embedder(np.ascontiguousarray(images[i : i + 1, :, ::-1])) for i in range(37)])
    for count in (2, 8, 16, 37):
        np.testing.assert_allclose(embedder(images[:count]), one[:count], atol=1e-5)
        np.testing.assert_allclose(embedder(images[:count], flip=True), mirrored[:count], atol=1e-5)
        both = embedder.start(images[:count], "both").result()
        np.testing.assert_allclose(both, np.stack([one, mirrored], 1)[:count], atol=1e-5)
    assert embedder.start(images[:0], "both").result().shape == (0, 2, 32)
    several = [embedder.start(images[i : i + 5], "plain") for i in range(0, 35, 5)]
    np.testing.assert_allclose(np.concatenate([part.result() for part in several[::-1]][::-1]), one[:35], atol=1e-5)


def no_conversion(*_):
    raise AssertionError("converted again")


def test_a_network_is_converted_once_and_never_stale(weights, layer, monkeypatch, capfd):
    folder, images = weights.parent / ".engines", pictures(2)
    first = load_embedder(weights)
    assert first.engine == "openvino"
    assert "converted once, kept as" in capfd.readouterr().err
    (file,) = folder.iterdir()
    with monkeypatch.context() as patched:
        patched.setattr(choose_engine, "save_onnx", no_conversion)
        for engine in ("openvino", "onnx"):  # one file for both
            np.testing.assert_allclose(load_embedder(weights, engine=engine)(images), first(images), atol=1e-5)
    file.write_bytes(file.read_bytes()[:1000])  # damaged
    np.testing.assert_allclose(load_embedder(weights)(images), first(images), atol=1e-6)
    state = {name: value + 1.0 if name == "features.bias" else value for name, value in state_of(layer).items()}
    save_pdparams(weights, state)
    second = load_embedder(weights)
    np.testing.assert_allclose(second(images), first(images) + 1.0, atol=1e-5)
    assert second.identity != first.identity
    (other,) = folder.iterdir()
    assert other.name != file.name


def test_a_folder_that_cannot_be_written(weights, tmp_path, monkeypatch, capfd):
    (weights.parent / ".engines").write_text("in the way")
    images = pictures(2)
    expected = load_embedder(weights)(images)
    assert f"kept as {tmp_path / 'cache'}" in capfd.readouterr().err
    assert sorted(path.name for path in weights.parent.iterdir()) == [".engines", "backbone.pdparams"]
    with monkeypatch.context() as patched:
        patched.setattr(choose_engine, "save_onnx", no_conversion)
        np.testing.assert_allclose(load_embedder(weights)(images), expected, atol=1e-6)
    monkeypatch.setenv("XDG_CACHE_HOME", str(weights))
    np.testing.assert_allclose(load_embedder(weights)(images), expected, atol=1e-6)
    assert "to be kept nowhere" in capfd.readouterr().err


def test_a_failed_conversion_keeps_nothing(weights, monkeypatch, capfd):
    def broken(layer, path):
        path.write_bytes(b"half")
        raise RuntimeError("unknown operator")

    monkeypatch.setattr(choose_engine, "save_onnx", broken)
    assert load_embedder(weights).engine == "predictor"
    assert "openvino cannot run here (RuntimeError: unknown operator); trying predictor" in capfd.readouterr().err
    assert not (weights.parent / ".engines").exists()


def test_weights_that_do_not_fit_are_told_once(weights, capfd):
    with pytest.raises(UserError, match="does not fit"):
        load_embedder(weights, "iresnet34")
    assert "trying" not in capfd.readouterr().err


def test_other_processors_are_measured_and_remembered(weights, monkeypatch, capfd):
    monkeypatch.setattr(choose_engine, "processor", lambda: ("AuthenticAMD EPYC", frozenset()))
    monkeypatch.setattr(choose_engine, "MEASURED_SECONDS", 0.03)
    speeds = {"openvino": 10.0, "predictor": 5.0, "onnx": 20.0}
    measured = []

    def images_s(engine, seconds):
        measured.append((engine.name, seconds))
        return speeds[engine.name]

    real = choose_engine._images_s
    with monkeypatch.context() as patched:
        patched.setattr(choose_engine, "_images_s", images_s)
        assert load_embedder(weights).engine == "onnx"
        assert measured == [(name, pytest.approx(0.01)) for name in ("openvino", "predictor", "onnx")]
        assert "measured on AuthenticAMD EPYC: openvino 10, predictor 5, onnx 20 images/s" in capfd.readouterr().err
        assert load_embedder(weights).engine == "onnx"
        assert len(measured) == 3
        speeds["openvino"] = 30.0
        assert load_embedder(weights, num_threads=1).engine == "openvino"  # another machine, so to speak
        assert len(measured) == 6
    assert 0 < real(load_embedder(weights)._engine, 0.01) < 1e5


@pytest.mark.parametrize(
    ("flags", "precision", "engine"),
    [
        ({"avx512_bf16"}, "fp32", "onnx"),
        ({"avx512_bf16"}, "auto", "openvino"),  # onnxruntime has no bfloat16: as fast in float32 says nothing
        ({"avx512_bf16"}, "bf16", "openvino"),
        ({"avx2"}, "auto", "onnx"),
    ],
)
def test_bfloat16_is_not_lost_to_what_is_faster_in_float32(weights, monkeypatch, flags, precision, engine):
    for module in (choose_engine, openvino_engine):
        monkeypatch.setattr(module, "processor", lambda: ("AuthenticAMD EPYC", frozenset(flags)))
    monkeypatch.setattr(OpenvinoEngine, "has_bfloat16", "avx512_bf16" in flags)
    monkeypatch.setattr(choose_engine, "_images_s", lambda engine, seconds: float(engine.name == "onnx"))
    assert load_embedder(weights, precision=precision).engine == engine


def test_what_no_engine_can_run_is_told_on_other_processors_too(tmp_path, monkeypatch):
    """None could be measured, and all are tried."""
    monkeypatch.setattr(choose_engine, "processor", lambda: ("AuthenticAMD EPYC", frozenset()))
    path = write_graph(tmp_path / "net.onnx", more=["map", "other"], tail=(12, 2, 2))
    with pytest.raises(UserError, match=r"exactly one of shape \[batch, size\]"):
        load_embedder(path)
    assert sorted(tmp_path.iterdir()) == [path]


def test_what_is_not_installed_is_named(weights, monkeypatch, capfd):
    real = choose_engine.importlib.util.find_spec
    monkeypatch.setattr(
        choose_engine.importlib.util, "find_spec", lambda name: None if name == "openvino" else real(name)
    )
    assert load_embedder(weights).engine == "predictor"
    assert "openvino would come first, but is not installed" in capfd.readouterr().err
    with pytest.raises(UserError, match="needs the package openvino"):
        load_embedder(weights, engine="openvino")


@pytest.fixture
def blurred(monkeypatch):
    """Makes bfloat16 as inexact as the test wants, on any processor; returns a setter."""
    error = {"size": 0.0}
    real = OpenvinoEngine.start

    def start(self, images, view="plain", largest=16):
        pending = real(self, images, view, largest)
        if self.precision == "fp32":
            return pending

        class Off:
            def result(self):
                found = pending.result()
                return found + error["size"] * np.linalg.norm(found, axis=-1, keepdims=True) * np.eye(32)[0]

        return Off()

    monkeypatch.setattr(OpenvinoEngine, "start", start)
    monkeypatch.setattr(OpenvinoEngine, "has_bfloat16", True)
    return lambda size: error.update(size=size)


@pytest.mark.parametrize(("size", "chosen"), [(0.0, "bf16"), (0.2, "fp32")])
def test_auto_precision_checks_on_the_users_images(weights, blurred, capfd, size, chosen):
    blurred(size)
    images = pictures(CHECKED_IMAGES + 8)
    exact = load_embedder(weights)(images)
    embedder = load_embedder(weights, precision="auto")
    assert embedder.precision == "auto" and embedder.identity.endswith("-auto")
    np.testing.assert_allclose(embedder(images[:4]), exact[:4], atol=1e-5)  # too few to decide by, unless they fail
    assert embedder.precision == ("auto" if chosen == "bf16" else "fp32")
    embedder(images)
    assert embedder.precision == chosen
    told = [line for line in capfd.readouterr().err.splitlines() if line.startswith("precision")]
    assert len(told) == 1  # 1.000000 where the processor has no bfloat16 and only the error is made up
    assert re.match(rf"precision {chosen}: least cosine of bfloat16 to float32 (0\.9|1\.0)", told[0])
    if chosen == "fp32":
        np.testing.assert_array_equal(embedder(images), exact)
        assert embedder.identity == load_embedder(weights).identity
    else:
        assert embedder.identity.endswith("-bf16")


def test_too_few_images_stay_in_float32(weights, blurred, capfd):
    images = pictures(CHECKED_IMAGES)
    blurred(1e-3)
    embedder = load_embedder(weights, precision="auto")
    exact = embedder(images[:4])
    embedder.stay()
    assert embed.precision_of(embedder.identity) == embedder.precision == "fp32"
    assert "precision fp32: 4 images are too few to check bfloat16 on (64 wanted)" in capfd.readouterr().err
    np.testing.assert_allclose(embedder(images)[:4], exact, atol=1e-4)  # would have been enough
    assert embedder.identity == load_embedder(weights).identity
    decided = load_embedder(weights, precision="auto")
    decided(images)
    decided.stay()
    assert embed.precision_of(decided.identity) == decided.precision == "bf16"


def test_bf16_is_refused_where_it_cannot_be(weights, monkeypatch, blurred, capfd):
    with pytest.raises(UserError, match="precision 'half': choose fp32, bf16, auto"):
        load_embedder(weights, precision="half")
    with pytest.raises(UserError, match="bf16: engine predictor computes in float32 alone"):
        load_embedder(weights, engine="predictor", precision="bf16")
    assert load_embedder(weights, engine="predictor", precision="auto").precision == "fp32"
    monkeypatch.setattr(OpenvinoEngine, "has_bfloat16", False)
    with pytest.raises(UserError, match="this processor does not compute in bfloat16"):
        load_embedder(weights, precision="bf16")
    assert load_embedder(weights, precision="auto").precision == "fp32"
    assert "precision fp32: this processor" in capfd.readouterr().err


def test_real_bfloat16_is_near(weights, layer):
    if not load_embedder(weights)._engine.has_bfloat16:
        pytest.skip("this processor does not compute in bfloat16")
    images = pictures(CHECKED_IMAGES)
    exact, found = (load_embedder(weights, precision=precision)(images) for precision in ("fp32", "bf16"))
    cosine = (exact * found).sum(1) / np.linalg.norm(exact, axis=1) / np.linalg.norm(found, axis=1)
    assert 0.999 < cosine.min() < 1 - 1e-6  # near, and really another precision


def test_a_stream_settles_first_and_is_not_continued_in_another_precision(weights, blurred, tmp_path):
    images = pictures(CHECKED_IMAGES + 10)
    embedder = load_embedder(weights, precision="auto")
    rows = embed_to_file(embedder, images, tmp_path / "a.npy", flip="add", chunk=20, show_progress=False)
    assert embedder.precision == "bf16"
    exact = load_embedder(weights).start(images, "both").result().sum(1)
    cosine = (rows * exact).sum(1) / np.linalg.norm(rows, axis=1) / np.linalg.norm(exact, axis=1)
    assert cosine.min() > 0.999  # bfloat16 also depends, within that, on the size of a piece
    options = {"chunk": 20, "show_progress": False}
    with pytest.raises(UserError, match="image 50 is damaged"):
        embed_to_file(embedder, Source(images, fail_at=50), tmp_path / "b.npy", **options)
    source = Source(images)
    embed_to_file(load_embedder(weights), source, tmp_path / "b.npy", **options)
    assert sorted(source.reads) == list(range(len(images)))  # begun in bf16, made anew in fp32


def test_a_call_returns_before_the_network_is_done(weights):
    """What lets reading and the network overlap."""
    embedder = load_embedder(weights, engine="openvino")
    import threading

    gate = threading.Event()
    blocked = [embedder._engine._pool.submit(gate.wait, 30) for _ in range(embedder._engine._num_threads + 1)]
    pending = embedder.start(pictures(3), "plain")
    gate.set()
    assert all(part.result() for part in blocked)
    np.testing.assert_allclose(pending.result(), embedder(pictures(3)), atol=1e-6)


def test_engines_obey_the_device_or_refuse(tmp_path, monkeypatch):
    path = write_graph(tmp_path / "net.onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    asked = []
    real = onnxruntime.InferenceSession

    def session(path, options, providers):
        asked.append(providers)
        return real(path, options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    OnnxEngine(path)
    assert asked == [["CPUExecutionProvider"]]
    monkeypatch.setattr(paddle, "get_device", lambda: "gpu:3")
    with pytest.raises(UserError, match="cannot use the GPU here"):
        OnnxEngine(path)
    assert asked[1][0] == ("CUDAExecutionProvider", {"device_id": 3})
    with pytest.raises(UserError, match="'openvino' runs on cpu, not on gpu:3"):
        OpenvinoEngine(path)
    for device in ("npu:0", "xpu:1", "custom_device:0"):
        monkeypatch.setattr(paddle, "get_device", lambda device=device: device)
        for engine in (PredictorEngine, OnnxEngine):
            with pytest.raises(UserError, match=f"runs on cpu and gpu, not on {device}"):
                engine(path)
        assert choose_engine.auto_order(is_onnx=False) == ("static", "dynamic")
    assert engines.device_index() == 0


def test_keys_see_weights_and_options(tmp_path):
    (tmp_path / "a").write_bytes(b"1")
    (tmp_path / "b").write_bytes(b"2")
    keys = {
        kept.weights_key(tmp_path / name, options) for name in "ab" for options in (None, {"width": 8}, {"width": 9})
    }
    assert len(keys) == 6


def test_only_what_is_converted_depends_on_our_code(tmp_path, monkeypatch):
    """A gallery or a table of features outlives an update of this project; a converted network does not."""
    code = tmp_path / "code"
    for name in ("backbones/resnet.py", "eval/engines.py"):
        (code / name).parent.mkdir(parents=True, exist_ok=True)
        (code / name).touch()
    (tmp_path / "a").write_bytes(b"1")
    monkeypatch.setattr(kept, "_CODE", code)
    weights = kept.weights_key(tmp_path / "a", None)
    converted = kept.converted_key(weights)
    (code / "backbones/resnet.py").write_text("# another comment")
    assert kept.weights_key(tmp_path / "a", None) == weights
    assert kept.converted_key(weights) != converted


def test_a_layer_runs_in_openvino_too():
    class Turned(Pixels):
        pass

    images = pictures(3, 4)
    found = load_embedder(Turned(), engine="openvino")
    np.testing.assert_allclose(found(images), load_embedder(Turned())(images), atol=1e-6)
    assert embed.ENGINES[0] == "openvino"
