"""tools/quantize.py: int8 networks keep their input and are near float32 on faces they have not seen, or are none."""

import sys

import cv2
import numpy as np
import onnx
import pytest
import yaml
from onnx import TensorProto, helper, numpy_helper

from eval.bins import save_bin
from eval.embed import load_embedder
from eval.network_input import read_onnx_input
from tests.test_embed import SMALL, state_of, trained_like
from tools import quantize
from tools.quantize import calibration_batches, choose, main
from utils.errors import UserError
from utils.weights.onnx_walk import read_onnx
from utils.weights.states import save_pdparams


def faces(count, size=112, seed=0):
    """Smooth pictures, uint8 [count, size, size, 3]: noise would say nothing about ranges."""
    small = np.random.default_rng(seed).integers(0, 256, (count, 7, 7, 3), dtype=np.uint8)
    return np.stack([cv2.resize(image, (size, size), interpolation=cv2.INTER_CUBIC) for image in small])


def encoded(image):
    return cv2.imencode(".png", image[..., ::-1])[1].tobytes()


@pytest.fixture(autouse=True)
def short_turns(monkeypatch):
    monkeypatch.setattr(quantize, "SECONDS", 0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Weights of a small iResNet, 40 crops, and a set of 30 pairs of other pictures."""
    place = tmp_path_factory.mktemp("quantize")
    save_pdparams(place / "backbone.pdparams", state_of(trained_like(width=8, embedding_size=32)))
    (place / "crops").mkdir()
    for number, image in enumerate(faces(40)):
        (place / "crops" / f"{number}.png").write_bytes(encoded(image))
    save_bin(place / "pairs.bin", [encoded(image) for image in faces(60, seed=1)], [k % 3 != 0 for k in range(30)])
    return place


def run(folder, images, output, *words):
    """The command, its errors as they are."""
    model = str(folder / "backbone.pdparams")
    paths = ["--model", model, "--network", "iresnet18", "--images", str(images), "--output", str(output)]
    main.__wrapped__([*paths, *words])


def cosine(left_ND, right_ND):
    left_ND, right_ND = left_ND.astype(np.float64), right_ND.astype(np.float64)
    return (left_ND * right_ND).sum(1) / np.sqrt((left_ND**2).sum(1) * (right_ND**2).sum(1))


def column(told, name):
    """The cells of a column of the printed table, float32's and int8's."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in told.splitlines() if line.startswith("|")]
    return [row[rows[0].index(name)] for row in rows[1:]]


def test_a_folder_of_crops(folder, tmp_path, capsys):
    output = tmp_path / "int8.onnx"
    run(folder, folder / "crops", output)
    told = capsys.readouterr().out
    assert "calibrated on 30 faces, checked on 10 others" in told
    assert [path.name for path in tmp_path.iterdir()] == ["int8.onnx"]
    # Every product of the network takes int8 weights: found in the file, whatever the command says.
    graph = onnx.load(str(output)).graph
    makers = {value: node for node in graph.node for value in node.output}
    products = [node for node in graph.node if node.op_type in ("Conv", "Gemm", "MatMul")]
    assert len(products) > 20

    def maker(name):
        node = makers[name]
        return maker(node.input[0]) if node.op_type in ("Identity", "Reshape") else node.op_type

    assert {maker(name) for node in products for name in node.input[:2]} == {"DequantizeLinear"}
    # Against the layer itself, on faces that nobody has seen, in either engine.
    others, dynamic = faces(16, seed=2), load_embedder(folder / "backbone.pdparams", "iresnet18", "dynamic")
    for engine in ("openvino", "onnx"):
        found = load_embedder(output, engine=engine)(others)
        assert not np.allclose(found, dynamic(others), rtol=1e-3)
        assert cosine(found, dynamic(others)).min() > 0.98
    # It is no source of weights, for this command or another, and never written over itself.
    before = output.read_bytes()
    with pytest.raises(UserError, match="is quantised already"):
        main.__wrapped__(
            ["--model", str(output), "--images", str(folder / "crops"), "--output", str(tmp_path / "b.onnx")]
        )
    with pytest.raises(UserError, match="is the model itself"):
        main.__wrapped__(["--model", str(output), "--images", str(folder / "crops"), "--output", str(output)])
    with pytest.raises(UserError, match=r"quantised.*--engine openvino or onnx"):
        read_onnx(output)
    assert output.read_bytes() == before and [path.name for path in tmp_path.iterdir()] == ["int8.onnx"]


def test_a_set_has_its_accuracy_and_the_cosines_are_those_of_the_file(folder, tmp_path, capsys):
    run(folder, folder / "pairs.bin", tmp_path / "new" / "int8.onnx", "--count", "40", "--seed", "3")
    told = capsys.readouterr().out
    images, models = faces(60, seed=1), [folder / "backbone.pdparams", tmp_path / "new" / "int8.onnx"]
    calibrated, checked = choose(60, 40, 3)
    assert len(calibrated) == 40 and len(checked) == 20
    both = [
        load_embedder(model, network, "openvino") for model, network in zip(models, ("iresnet18", None), strict=True)
    ]
    sums = [each(images) + each(images, flip=True) for each in both]
    expected = cosine(*sums)[checked]
    assert column(told, "Mean cosine") == ["1.00000", f"{expected.mean():.5f}"]
    assert column(told, "Least cosine") == ["1.00000", f"{expected.min():.5f}"]
    # AUC by counting: how often a pair of one person is nearer than a pair of two.
    same_P = np.arange(30) % 3 != 0
    for shown, sum_ND in zip(column(told, "pairs AUC"), sums, strict=True):
        score_P = cosine(sum_ND[0::2], sum_ND[1::2])
        wins = np.greater.outer(score_P[same_P], score_P[~same_P])
        assert float(shown) == pytest.approx(wins.mean(), abs=1e-5)
    assert all("+-" in cell for cell in column(told, "pairs Accuracy-Flip"))


@pytest.mark.parametrize(("num_images", "count"), [(32, 300), (400, 300), (5000, 300), (100, 1)])
def test_what_is_checked_was_not_calibrated_on(num_images, count):
    calibrated, checked = choose(num_images, count, seed=0)
    assert not set(calibrated) & set(checked) and len(set(calibrated)) == len(calibrated)
    assert len(calibrated) == min(count, num_images * 3 // 4)
    assert len(checked) == min(num_images - len(calibrated), quantize.MOST_CHECKED)
    assert set(np.concatenate([calibrated, checked])) <= set(range(num_images))


def write_network(path, batch="n", last=False, dtype=TensorProto.FLOAT):
    """(x - 127.5) / 128, a convolution, a ReLU, a product: [batch, 3, 16, 16] or channels last -> [batch, 8]."""
    rng = np.random.default_rng(0)
    arrays = {"mean": np.float32(127.5), "scale": np.float32(128), "w": rng.standard_normal((4, 3, 3, 3), np.float32)}
    arrays["v"] = rng.standard_normal((4 * 14 * 14, 8), np.float32)
    shape, nodes, value = [batch, *((16, 16, 3) if last else (3, 16, 16))], [], "data"

    def add(kind, *more, **attributes):
        nonlocal value
        nodes.append(helper.make_node(kind, [value, *more], [f"v{len(nodes)}"], **attributes))
        value = nodes[-1].output[0]

    if dtype != TensorProto.FLOAT:
        add("Cast", to=TensorProto.FLOAT)
    add("Sub", "mean")
    add("Div", "scale")
    if last:
        add("Transpose", perm=[0, 3, 1, 2])
    for kind, more in (("Conv", ["w"]), ("Relu", []), ("Flatten", []), ("MatMul", ["v"])):
        add(kind, *more)
    constants = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    ends = [helper.make_tensor_value_info("data", dtype, shape)], [helper.make_tensor_value_info(value, 1, [batch, 8])]
    model = helper.make_model(
        helper.make_graph(nodes, "g", *ends, constants), opset_imports=[helper.make_opsetid("", 13)], ir_version=8
    )
    onnx.save(onnx.shape_inference.infer_shapes(model), str(path))


@pytest.mark.parametrize("options", [{}, {"batch": 3}, {"last": True}, {"dtype": TensorProto.UINT8}], ids=str)
def test_networks_of_others_keep_their_input(tmp_path, options):
    source, output = tmp_path / "source.onnx", tmp_path / "int8.onnx"
    write_network(source, **options)
    images = faces(40, 16)
    quantize.quantize(source, images, output)
    assert read_onnx_input(output) == read_onnx_input(source)
    full, reduced = (load_embedder(path, engine="onnx")(images) for path in (source, output))
    assert cosine(full, reduced).min() > 0.99


@pytest.mark.slow
@pytest.mark.parametrize("network", ["mobilefacenet", "vit_t"])
def test_other_families(tmp_path, network):
    save_pdparams(tmp_path / "backbone.pdparams", state_of(trained_like(network, **SMALL[network])))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": {"network": network, **SMALL[network]}}))
    save_bin(tmp_path / "pairs.bin", [encoded(image) for image in faces(60)], [k % 2 == 0 for k in range(30)])
    words = ["--model", tmp_path / "backbone.pdparams", "--images", tmp_path / "pairs.bin", "--least-cosine", 0.9]
    main([*map(str, words), "--output", str(tmp_path / "int8.onnx")])
    assert (tmp_path / "int8.onnx").is_file()


def test_batches_are_filled_with_the_first_images(tmp_path):
    write_network(tmp_path / "source.onnx", batch=3)
    images = faces(4, 16)
    batches = calibration_batches(images, read_onnx_input(tmp_path / "source.onnx"))
    rows = np.concatenate(batches).transpose(0, 2, 3, 1)
    np.testing.assert_array_equal(rows, images[[0, 1, 2, 3, 0, 1]])


def refused(folder, output, *words, images="crops"):
    with pytest.raises(UserError) as caught:
        run(folder, folder / images, output, *words)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_refused_leaves_nothing(folder, tmp_path, monkeypatch):
    output = tmp_path / "int8.onnx"
    assert "its mean cosine to float32 is 0.9" in refused(folder, tmp_path / "new" / "x.onnx", "--least-cosine", "1")
    (tmp_path / "few").mkdir()
    for number, image in enumerate([*faces(10), *faces(10), *faces(10), *faces(10)]):
        (tmp_path / "few" / f"{number}.png").write_bytes(encoded(image))
    assert "10 different faces; at least 32 are needed" in refused(folder, output, images=tmp_path / "few")
    assert "must end in .onnx" in refused(folder, tmp_path / "int8.pt")
    assert "exclude each other" in refused(folder, output, "--detector", "mtcnn", "--landmarks", "x.txt")
    assert "are for photos" in refused(folder, output, "--detector", "mtcnn", images="pairs.bin")
    monkeypatch.setitem(sys.modules, "nncf", None)
    assert "needs the package nncf" in refused(folder, output)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["few"]
