"""The training loader: order, sharding, resumption, determinism, errors, clean ends."""

import subprocess
import sys
import threading
import time
import traceback
from itertools import chain
from pathlib import Path

import cv2
import numpy as np
import paddle
import pytest

from dataset import FaceRecordDataset, build_source, build_train_loader
from mxnet_reader import RecordError, recordio
from tests.loader_sources import Broken, Numbered
from utils.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.oldest
AUGMENT = {"affine": {}, "photometric": {"probability": 0.7}, "erase": {"noise": True}}


def samples_of(loader):
    """Sample numbers that a loader over ``Numbered`` gives, batch by batch."""
    found = []
    for image, label in loader:
        assert image.shape[1:] == [3, 8, 8] and image.dtype == paddle.float32 and label.dtype == paddle.int64
        pixels = np.rint((image.numpy() + 1) * 127.5).astype(int)[:, :, 4, 0]
        samples = pixels[:, 0] + 256 * pixels[:, 1]
        assert np.array_equal(label.numpy(), samples % 7)
        assert np.array_equal(loader.last_keys, samples + 1000)
        found.append(samples.tolist())
    return found


def join(parts):
    return list(chain.from_iterable(parts))


def make(source, batch_size=8, **options):
    return build_train_loader(source, batch_size, image_size=8, **options)


def test_one_epoch_is_a_permutation():
    loader = make(Numbered(80))
    first = join(samples_of(loader))
    assert sorted(first) == list(range(80)) and first != list(range(80))
    second = join(samples_of(loader))  # the next epoch, reshuffled
    assert sorted(second) == list(range(80)) and second != first
    loader.set_epoch(0)
    assert join(samples_of(loader)) == first
    assert join(samples_of(make(Numbered(80), seed=1))) != first
    assert len(loader) == 10


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_one_global_permutation(world_size):
    alone = samples_of(make(Numbered(100), batch_size=4 * world_size))
    ranks = [samples_of(make(Numbered(100), batch_size=4, rank=r, world_size=world_size)) for r in range(world_size)]
    assert [join(parts) for parts in zip(*ranks, strict=True)] == alone


def test_last_batch():
    assert len(samples_of(make(Numbered(20), batch_size=8))) == 2
    whole = samples_of(make(Numbered(20), batch_size=8, drop_last=False))
    assert [len(batch) for batch in whole] == [8, 8, 4]
    assert sorted(join(whole)) == list(range(20))
    ranks = [samples_of(make(Numbered(21), 4, rank=r, world_size=2, drop_last=False)) for r in range(2)]
    assert [[len(batch) for batch in rank] for rank in ranks] == [[4, 4, 3]] * 2  # equal on all ranks
    assert set(join(ranks[0] + ranks[1])) == set(range(21))
    small = samples_of(make(Numbered(3), batch_size=8, drop_last=False))
    assert sorted(small[0]) == [0, 1, 2]
    with pytest.raises(UserError, match="do not fill one batch"):
        make(Numbered(3), batch_size=8)


def batches(source, **options):
    return [(image.numpy(), label.numpy()) for image, label in make(source, **options)]


def equal(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert np.array_equal(a[0], b[0]) and np.array_equal(a[1], b[1])


def test_same_data_whatever_the_threads():
    source = build_source("synthetic", num_classes=5, num_images=48, image_size=8)
    reference = batches(source, augment=AUGMENT, num_threads=1)
    for threads in (2, 5):
        equal(batches(source, augment=AUGMENT, num_threads=threads), reference)
    assert not np.array_equal(batches(source, augment=AUGMENT, seed=1)[0][0], reference[0][0])


def test_augmentation_follows_the_sample_not_its_place():
    """Sample s in epoch e looks the same at another batch size and world size, and otherwise in another epoch."""
    source = build_source("synthetic", num_classes=5, num_images=40, image_size=8)

    def by_key(**options):
        loader, found = make(source, augment=AUGMENT, **options), {}
        for image, _ in loader:
            found |= dict(zip(loader.last_keys.tolist(), image.numpy(), strict=True))
        return found, loader

    one, loader = by_key(batch_size=8)
    other = {}
    for rank in range(2):
        other |= by_key(batch_size=5, rank=rank, world_size=2)[0]
    assert one.keys() == other.keys() and all(np.array_equal(one[key], other[key]) for key in one)
    again = {
        key: image for batch, _ in loader for key, image in zip(loader.last_keys.tolist(), batch.numpy(), strict=True)
    }
    assert sum(not np.array_equal(one[key], again[key]) for key in one) > 30


def test_flip_is_a_mirror_of_half_of_the_samples():
    source = Numbered(512)
    plain = batches(source, flip=False, batch_size=512)[0][0]
    flipped = batches(source, flip=True, batch_size=512)[0][0]
    mirrored = [
        np.array_equal(a[:, :, ::-1], b) and not np.array_equal(a, b) for a, b in zip(plain, flipped, strict=True)
    ]
    same = [np.array_equal(a, b) for a, b in zip(plain, flipped, strict=True)]
    assert all(a != b for a, b in zip(mirrored, same, strict=True))
    assert 200 < sum(mirrored) < 312


@pytest.mark.parametrize("normalize", [False, True])
def test_flip_on_the_device_equals_flip_on_the_host(normalize):
    options = {"normalize": normalize, "augment": AUGMENT}
    source = build_source("synthetic", num_classes=5, num_images=32, image_size=8)
    for (a, _), (b, _) in zip(
        batches(source, flip_on_host=True, **options), batches(source, flip_on_host=False, **options), strict=True
    ):
        assert a.dtype == b.dtype == (np.float32 if normalize else np.uint8)
        assert a.shape == b.shape == ((8, 3, 8, 8) if normalize else (8, 8, 8, 3))
        assert np.abs(a.astype(np.float64) - b).max() <= 1e-6


def test_normalisation_by_hand():
    image = batches(Numbered(16), flip=False)[0][0]
    raw = batches(Numbered(16), flip=False, normalize=False)[0][0]
    expected = ((raw.astype(np.float64) / 255 - 0.5) / 0.5).transpose(0, 3, 1, 2)
    assert np.abs(image - expected).max() < 1e-6


@pytest.mark.parametrize("stop", [1, 3])
def test_resume_in_the_middle(stop):
    reference = samples_of(make(Numbered(64)))
    loader = make(Numbered(64))
    for batch, _ in enumerate(loader, 1):
        if batch == stop:
            break
    state = loader.state_dict()
    assert state["epoch"] == 0 and state["position"] == 8 * stop  # what was given out, not what was decoded ahead
    source = Numbered(64)
    resumed = make(source)
    resumed.load_state_dict(state)
    resumed.set_epoch(0)  # as the training loop does
    assert samples_of(resumed) == reference[stop:]
    assert sorted(source.seen) == sorted(join(reference[stop:]))  # nothing consumed is read again
    assert resumed.state_dict()["epoch"] == 1 and resumed.state_dict()["position"] == 0
    resumed.set_epoch(0)
    assert len(samples_of(resumed)) == 8  # an epoch asked for anew is whole


def test_resume_at_another_world_size():
    loader = make(Numbered(64))
    for _ in zip(range(2), loader, strict=False):
        pass
    ranks = []
    for rank in range(2):
        resumed = make(Numbered(64), batch_size=4, rank=rank, world_size=2)
        resumed.load_state_dict(loader.state_dict())
        ranks.append(samples_of(resumed))
    reference = samples_of(make(Numbered(64)))
    assert [join(parts) for parts in zip(*ranks, strict=True)] == reference[2:]


def test_state_of_another_set_is_refused():
    loader = make(Numbered(64))
    with pytest.raises(UserError, match="num_samples was 65"):
        loader.load_state_dict({"epoch": 0, "position": 8, "seed": 0, "num_samples": 65})
    with pytest.raises(UserError, match="seed was 3"):
        loader.load_state_dict({"epoch": 0, "position": 8, "seed": 3, "num_samples": 64})


def test_worker_errors_arrive_with_their_traceback():
    loader = make(Broken(64))
    with pytest.raises(LookupError, match="sample thirteen is cursed") as caught:
        for _ in loader:
            pass
    text = "".join(traceback.format_exception(caught.value))
    assert "in fetch" in text and "loader_sources.py" in text
    loader.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("face-loader")]


def write_records(folder, encoded):
    writer = recordio.MXIndexedRecordIO(folder / "train.idx", folder / "train.rec", "w")
    for key, data in enumerate(encoded):
        writer.write_idx(key, recordio.pack(recordio.IRHeader(0, float(key), key, 0), data))
    writer.close()
    return FaceRecordDataset(folder)


def jpeg(value, height=112, width=112, channels=3, suffix=".jpg"):
    shape = (height, width) if channels == 1 else (height, width, channels)
    return cv2.imencode(suffix, np.full(shape, value, np.uint8))[1].tobytes()


def test_damaged_and_wrongly_sized_images_are_named(tmp_path):
    good = jpeg(100)
    data = write_records(tmp_path, [good, good[: len(good) // 2], good])
    with pytest.raises(RecordError, match=r"train\.rec: .*key 1\)"):
        list(build_train_loader(data, 3))
    data = write_records(tmp_path, [good, good, jpeg(7, 100, 90)])
    with pytest.raises(RecordError, match=r"image of 100x90, 112x112 expected.*key 2\)"):
        list(build_train_loader(data, 3))


def test_png_grey_small_and_large_images(tmp_path):
    encoded = [jpeg(100), jpeg(50, suffix=".png"), jpeg(200, channels=1), jpeg(10, channels=1, suffix=".png")]
    data = write_records(tmp_path, encoded)
    loader = build_train_loader(data, 4, normalize=False, flip=False)
    (image, label), *_ = list(loader)
    for row, value in zip(image.numpy(), np.array([100, 50, 200, 10])[label.numpy()], strict=True):
        assert np.abs(row.astype(int) - value).max() <= 1
    data = write_records(tmp_path, [jpeg(30, 200, 150), jpeg(60, 50, 300), jpeg(90), jpeg(120, 20, 20)])
    for resize in (True, "stretch", "crop"):
        (image, label), *_ = list(build_train_loader(data, 4, normalize=False, resize=resize))
        for row, value in zip(image.numpy(), np.array([30, 60, 90, 120])[label.numpy()], strict=True):
            assert np.abs(row.astype(int) - value).max() <= 1
    assert next(iter(build_train_loader(data, 2, resize=True, image_size=(96, 80))))[0].shape == [2, 3, 96, 80]


def test_batches_kept_by_the_caller_stay_as_they_are():
    """Buffers are used again only when the last tensor on them is gone."""
    source = build_source("synthetic", num_classes=5, num_images=256, image_size=8)
    for normalize in (False, True):
        copies = [image.numpy().copy() for image, _ in make(source, normalize=normalize)]
        kept = [image for image, _ in make(source, normalize=normalize)]
        for tensor, copy in zip(kept, copies, strict=True):
            assert np.array_equal(tensor.numpy(), copy)


def loader_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("face-loader")]


def test_nothing_is_left_running():
    source = build_source("synthetic", num_classes=5, num_images=64, image_size=8)
    loader = make(source)
    list(loader)
    assert not loader_threads()
    for _ in loader:
        break
    assert not loader_threads()
    iterator = iter(loader)
    next(iterator)
    assert loader_threads()
    loader.close()
    assert not loader_threads()


def test_interpreter_ends_while_a_loader_runs(tmp_path):
    script = (
        "from dataset import *\n"
        "source = build_source('synthetic', num_classes=5, num_images=4096, image_size=32)\n"
        "running = iter(build_train_loader(source, 16, image_size=32)); next(running)\n"
        "print('end')"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], cwd=ROOT, timeout=90, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.strip() == "end", done.stderr


@pytest.mark.parametrize("waiting", [False, True])
def test_closing_ends_an_iteration_that_goes_on(waiting):
    """No hang: neither for who asks for the next batch afterwards nor for who waits for one in another thread."""
    begun, release = threading.Event(), threading.Event()

    class Slow(Numbered):
        def fetch(self, i):
            begun.set()
            if waiting:
                release.wait(30)
            return super().fetch(i)

    # Waiting: the second of two batches is not begun when the loader is closed, and nothing is submitted afterwards.
    loader = build_train_loader(Slow(16 if waiting else 64), 8, num_threads=1, image_size=8, prefetch=2)
    outcome = []

    def consume():
        try:
            for _ in loader:
                if not waiting:
                    loader.close()
        except RuntimeError as error:
            outcome.append(str(error))

    consumer = threading.Thread(target=consume, daemon=True)
    consumer.start()
    if waiting:
        assert begun.wait(30)
        threading.Timer(0.2, release.set).start()
        loader.close()
    consumer.join(30)
    assert not consumer.is_alive() and outcome == ["the loader was closed while it was iterated"]
    assert not loader_threads()


@pytest.mark.parametrize("num_threads", [1, 3])
def test_of_several_errors_the_first_sample_s_is_raised(num_threads):
    class Failing(Numbered):
        def fetch(self, i):
            time.sleep(0.05 if i == first else 0)  # the others fail before
            raise LookupError(f"sample {i}")

    loader = build_train_loader(Failing(48), 48, num_threads=num_threads, image_size=8, prefetch=1)
    first = int(loader.order(0)[0])
    with pytest.raises(LookupError, match=f"^sample {first}$"):
        list(loader)


@pytest.mark.parametrize(
    ("option", "value"),
    [("batch_size", 0), ("num_threads", 0), ("rank", 2), ("resize", "maybe"), ("prefetch", 0)],
)
def test_bad_options_are_named(option, value):
    options = {"batch_size": 8, option: value}
    with pytest.raises(UserError, match=f"{option}.*{value}"):
        build_train_loader(Numbered(64), image_size=8, **options)


def test_any_sequence_of_images_serves():
    samples = [(np.full((8, 8, 3), i, np.uint8), i) for i in range(16)]
    image, label = next(iter(make(samples, normalize=False)))
    assert (image.numpy()[:, 0, 0, 0] == label.numpy()).all()


SOAK = """
import zlib  # before paddle: 2.6 exports a zlib of its own, on which Python's then crashes
import sys, resource, paddle
from dataset import build_source, build_train_loader
import os
def rss():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
source = build_source("synthetic", num_classes=1000, num_images=int(sys.argv[1]), image_size=4)
loader = build_train_loader(source, 512, image_size=4)
start = peak = None
for step, (image, label) in enumerate(loader):
    if step == 20:
        start = peak = rss()
    elif step > 20 and step % 20 == 0:
        peak = max(peak, rss())
print(step + 1, start, peak)
"""


def soak(count):
    command = [sys.executable, "-W", "ignore", "-c", SOAK, str(count)]
    done = subprocess.run(command, cwd=ROOT, timeout=1200, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    steps, start, peak = map(float, done.stdout.split())
    assert steps == count // 512
    return peak - start


def test_memory_stays_flat_over_twenty_thousand_records():
    assert soak(20_480) < 60


@pytest.mark.slow
@pytest.mark.timeout(1300)
def test_memory_stays_flat_over_a_million_records():
    assert soak(1_000_000) < 200


def test_prefetch_works_while_the_caller_is_busy():
    """Decoding goes on behind the consumer's back, up to the prefetch depth and no further."""
    source = Numbered(512)
    iterator = iter(make(source, prefetch=3))
    next(iterator)
    time.sleep(0.5)
    assert len(source.seen) == 8 * 3  # the one given out, and those submitted with it
    next(iterator)
    time.sleep(0.5)
    assert len(source.seen) == 8 * 4
    iterator.close()
