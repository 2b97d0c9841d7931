"""eval/during_training.py: what a training run judges itself by."""

import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from backbones import build_backbone
from eval.bins import save_bin
from eval.during_training import Verification
from utils.errors import UserError


def jpeg(size: int, seed: int) -> bytes:
    image = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return cv2.imencode(".jpg", image)[1].tobytes()


def test_a_set_of_mixed_sizes_is_judged_and_the_mode_put_back(tmp_path):
    images = [jpeg(size, seed) for seed, size in enumerate([32, 40, 64, 32] * 5)]
    save_bin(tmp_path / "odd.bin", images, [pair % 2 == 0 for pair in range(10)])
    layer = build_backbone("iresnet18", width=4, input_size=32, embedding_size=16)
    layer.train()
    layer.bn1.eval()
    modes = [part.training for part in layer.sublayers(include_self=True)]
    figures = Verification(tmp_path, ("odd",), batch_size=8, input_size=32)(layer)
    assert 0 <= figures["odd"]["accuracy"] <= 1
    assert [part.training for part in layer.sublayers(include_self=True)] == modes


def test_missing_and_damaged_sets_end_the_run_at_its_start(tmp_path):
    (tmp_path / "bad.bin").write_bytes(b"no pickle")
    with pytest.raises(UserError, match=r"a\.bin, .*b\.bin missing"):
        Verification(tmp_path, ("a", "b"), batch_size=8, input_size=32)
    with pytest.raises(UserError, match=r"bad\.bin"):
        Verification(tmp_path, ("bad",), batch_size=8, input_size=32)
    save_bin(tmp_path / "one.bin", [jpeg(32, 0), jpeg(32, 1)], [True])
    with pytest.raises(UserError, match=r"one\.bin: 1 pair in it; folds need at least two"):
        Verification(tmp_path, ("one",), batch_size=8, input_size=32)


def test_names_with_suffix_and_sets_of_one_name(tmp_path):
    """``lfw`` of two folders are two sets; what a set lacks is known before the run starts."""
    images = [jpeg(32, seed) for seed in range(4)]
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        save_bin(tmp_path / folder / "lfw.v1.bin", images, [True, True])
    names = (str(tmp_path / "a" / "lfw.v1.bin"), str(tmp_path / "b" / "lfw.v1.bin"), " lfw.v1 ")
    verification = Verification(tmp_path / "a", names, batch_size=8, input_size=32)
    assert list(verification.sets) == ["lfw.v1", str(tmp_path / "b" / "lfw.v1.bin")]
    assert any("all 2 pairs are genuine" in line for line in verification.warnings)


def test_a_name_with_its_suffix_lies_in_the_folder_of_the_sets(tmp_path):
    save_bin(tmp_path / "a.bin", [jpeg(32, seed) for seed in range(8)], [True, False] * 2)
    assert Verification(tmp_path, ("a.bin",), batch_size=8, input_size=32)
    with pytest.raises(UserError, match=rf"{tmp_path}/none\.bin missing"):
        Verification(tmp_path, ("none.bin",), batch_size=8, input_size=32)


def test_training_loads_no_plotting_library():
    """A run judges itself on hundreds of ranks; pictures belong to the scripts."""
    code = "import eval.during_training, sys; print([m for m in ('matplotlib', 'prettytable') if m in sys.modules])"
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
