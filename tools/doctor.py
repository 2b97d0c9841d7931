"""Is this machine ready to train? Measures what usually goes wrong and says what to do about it.

Launch::

    python tools/doctor.py                             # about half a minute
    python tools/doctor.py --data /data/faces_emore    # the disk that holds the training set
    python tools/doctor.py --seconds 0 --no-ranks      # skip the training step and the launch of two ranks
    python tools/doctor.py --json doctor.json

Each line is ``ok``, ``warn`` (it will work, but worse than it could) or ``fail`` (training will not run), with advice
where something is off. Exit status 1 if anything failed. Every check stands by itself: what one of them cannot find or
import is its finding, not the end of the others.
"""

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.errors import POSITIVE, CommandLine, check_ranges, one_line_errors
from utils.launch import launch_command, rank_environment
from utils.system import BF16_CAPABILITY, num_cores, proc_bytes, without_machine_code

OLDEST_PADDLE, NEWEST_PADDLE = (2, 6), (3, 3)
REQUIRED = ("numpy", "pydantic", "yaml", "rich", "prettytable", "cv2", "sklearn", "matplotlib", "safetensors")
OPTIONAL = {"simplejpeg": "JPEG decode", "tensorboardX": "TensorBoard", "visualdl": "VisualDL", "onnxruntime": "ONNX"}
MIB, GIB = 1 << 20, 1 << 30
SHM_BYTES = 1 * GIB  # NCCL's buffers between the ranks of one machine
DISK_MIB_S = 150.0  # one GPU at 2,500 images/s reads 25 MB/s of JPEG; eight GPUs 200
DECODE_IMAGES_S = 1500.0  # a core; measured on common servers: 5,000 to 7,000
SYMBOL = {"ok": "ok  ", "warn": "WARN", "fail": "FAIL"}
RANK_PROGRAM = "--rank-program"  # what the two launched ranks run


@dataclass(frozen=True)
class Finding:
    """One line of the report. ``status``: ok, warn or fail; ``advice`` is empty where all is well."""

    name: str
    value: str
    status: str = "ok"
    advice: str = ""


def judge(name: str, value: str, problem: str = "", status: str = "warn") -> Finding:
    """A finding that is ok unless there is a problem to give advice about."""
    return Finding(name, value, status if problem else "ok", problem)


def check_python(version: tuple[int, ...] = sys.version_info[:3]) -> Finding:
    """3.10 to 3.12 are what the dependencies have wheels for."""
    supported = (3, 10) <= tuple(version[:2]) <= (3, 12)
    problem = "" if supported else "use Python 3.10 to 3.12; Paddle has no wheels for this one"
    where = f"{'.'.join(map(str, version))} ({platform.machine()}, {platform.system()}) {sys.executable}"
    return judge("python", where, problem, "fail")


def check_packages(missing: Callable[[str], bool] = lambda name: importlib.util.find_spec(name) is None) -> Finding:
    """The packages of pyproject.toml, looked up without importing them."""
    lacking = [name for name in REQUIRED if missing(name)]
    optional = [f"{name} ({use})" for name, use in OPTIONAL.items() if missing(name)]
    if lacking:
        advice = "run: make setup (or pip install -e '.[cpu]')"
        return Finding("packages", f"missing: {', '.join(lacking)}", "fail", advice)
    value = f"without {', '.join(optional)}" if optional else "all there"
    advice = "decoding is faster with it: pip install simplejpeg" if missing("simplejpeg") else ""
    return judge("packages", value, advice)


def check_paddle() -> Finding:
    """The version and what it was built for; two Paddle packages side by side overwrite each other's files."""
    try:
        import paddle
    except Exception as error:
        advice = "pip install -e '.[cpu]' or '.[gpu]'; see docs/install.md"
        return Finding("paddle", f"import failed: {error}", "fail", advice)
    built = "CUDA " + str(paddle.version.cuda()) if paddle.device.is_compiled_with_cuda() else "CPU"
    version = tuple(int(part) for part in paddle.__version__.split(".")[:2] if part.isdigit())
    problem = "" if OLDEST_PADDLE <= version <= NEWEST_PADDLE else "tested with 2.6.2 to 3.3.1; pin one of these"
    installed = [name for name in ("paddlepaddle", "paddlepaddle-gpu") if _installed(name)]
    if len(installed) > 1:
        problem = "both paddlepaddle and paddlepaddle-gpu are installed; uninstall both, then install one"
    return judge("paddle", f"{paddle.__version__} ({built})", problem)


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def check_device() -> Finding:
    """The accelerator that ``run.device=auto`` takes."""
    import paddle

    if not paddle.device.is_compiled_with_cuda():
        if shutil.which("nvidia-smi"):
            advice = "a GPU driver is here, but this Paddle is the CPU build: pip install -e '.[gpu]' (docs/install.md)"
            return Finding("device", "cpu", "warn", advice)
        return Finding("device", f"cpu, {available_cpus()} cores")
    count = paddle.device.cuda.device_count()
    if count == 0:
        advice = "a CUDA build without a visible GPU: check nvidia-smi, the driver and CUDA_VISIBLE_DEVICES"
        return Finding("device", "cpu (CUDA build)", "warn", advice)
    cards = [paddle.device.cuda.get_device_properties(index) for index in range(count)]
    listed = ", ".join(f"{card.name} ({card.major}.{card.minor}) {card.total_memory / GIB:.0f} GiB" for card in cards)
    value = f"{count} x gpu: {listed}"
    for card in cards:
        problem = without_machine_code((card.major, card.minor), paddle.__version__, str(paddle.version.cuda()))
        if problem:
            return Finding("device", value, "fail", problem)
    problem = failing_operation("gpu:0")
    if problem:
        advice = "this build, the driver or its CUDA libraries do not fit this card; see docs/install.md"
        return Finding("device", f"{value}; a matrix product failed: {problem}", "fail", advice)
    if any((card.major, card.minor) < BF16_CAPABILITY for card in cards):
        return Finding("device", value, "ok", "no bf16 below compute capability 8.0: use run.precision=fp16")
    return Finding("device", value)


def failing_operation(place: str, timeout: float = 120.0) -> str | None:
    """What one real product and convolution on ``place`` say, in a process of their own: a bad build may crash."""
    code = (
        "import sys, paddle; paddle.set_device(sys.argv[1]); x = paddle.ones([8, 8, 8, 8]); "
        "y = paddle.matmul(x, x) + paddle.nn.functional.conv2d(x, paddle.ones([8, 8, 3, 3]), padding=1); "
        "assert float(y[0, 0, 4, 4]) == 80.0, float(y[0, 0, 4, 4])"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, place]
    try:
        done = subprocess.run(command, timeout=timeout, capture_output=True, text=True, check=False)
    except subprocess.TimeoutExpired:
        return f"no answer in {timeout:.0f} s"
    if done.returncode == 0:
        return None
    last = done.stderr.strip().splitlines()[-1:] or ["no message"]
    return f"{last[0][:160]} (status {done.returncode})"


def available_cpus() -> int:
    """Cores that this process may use: affinity and the cgroup's quota, not the cores of the host."""
    cores = num_cores()
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.exists():
        limit, period = quota.read_text().split()[:2]
        if limit != "max":
            cores = min(cores, max(1, round(int(limit) / int(period))))
    return cores


def check_threads(cpus: int | None = None, omp: str | None = None) -> Finding:
    """``import paddle`` sets one OpenMP thread unless OMP_NUM_THREADS says otherwise."""
    cpus = available_cpus() if cpus is None else cpus
    omp = os.environ.get("OMP_NUM_THREADS", "") if omp is None else omp
    value = f"{cpus} cores, OMP_NUM_THREADS={omp or 'unset (Paddle takes 1)'}"
    if omp and not (omp.isdigit() and int(omp) > 0):
        return Finding("threads", value, "warn", "OMP_NUM_THREADS must be a positive number")
    if omp and int(omp) > cpus:
        return Finding("threads", value, "warn", f"more threads than cores; set OMP_NUM_THREADS to at most {cpus}")
    if cpus > 1 and (not omp or int(omp) == 1):
        ranks = f"{cpus} ranks of one thread (--nproc_per_node {cpus})"
        return Finding("threads", value, "ok", f"on CPU start {ranks}, or set OMP_NUM_THREADS={cpus} for one")
    return Finding("threads", value)


def check_memory() -> Finding:
    """Main memory that is free for us."""
    if not Path("/proc/meminfo").exists():
        return Finding("memory", "not known on this system")
    available = proc_bytes("meminfo", "MemAvailable")
    problem = "" if available >= 4 * GIB else "less than 4 GiB free; use small batches and `python tools/plan.py` first"
    return judge("memory", f"{available / GIB:.1f} GiB available", problem)


def check_shm(path: str = "/dev/shm", needed: int = SHM_BYTES) -> Finding:
    """Shared memory: what NCCL uses between the ranks of one machine."""
    if not Path(path).is_dir():
        return Finding("shm", f"no {path}", "ok", "only several GPUs of one machine need it")
    free = shutil.disk_usage(path).free
    problem = "" if free >= needed else "docker run --shm-size=8g (or --ipc=host), for several GPUs"
    return judge("shm", f"{free / GIB:.2f} GiB free in {path}", problem)


def check_disk(folder: Path, megabytes: int = 256) -> Finding:
    """Sequential write and uncached read of a file in ``folder``, which must be there; free space."""
    if not folder.is_dir():
        advice = "give --data the folder that holds the training set"
        return Finding("disk", f"{folder}: no such folder", "fail", advice)
    block = os.urandom(MIB)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor-") as file:
        start = time.perf_counter()
        for _ in range(megabytes):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        write = megabytes / (time.perf_counter() - start)
        if hasattr(os, "posix_fadvise"):  # drop our pages, so that the disk is read and not the cache
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        start = time.perf_counter()
        while file.read(4 * MIB):
            pass
        read = megabytes / (time.perf_counter() - start)
    free = shutil.disk_usage(folder).free
    value = f"{read:,.0f} MiB/s read, {write:,.0f} MiB/s write, {free / GIB:.0f} GiB free in {folder}"
    if free < 10 * GIB:
        return Finding("disk", value, "warn", "less than 10 GiB free: checkpoints of a large head may not fit")
    slow = "slow for several GPUs: put train.rec on a local SSD or in /dev/shm"
    return judge("disk", value, "" if read >= DISK_MIB_S else slow)


def check_decode(seconds: float = 1.0) -> Finding:
    """JPEG decode of noise-like 112x112 faces with as many threads as cores, as the loader does it."""
    import cv2
    import numpy as np

    from utils import decode

    smooth_HWC = cv2.GaussianBlur(np.random.default_rng(0).integers(0, 256, (112, 112, 3), np.uint8), (0, 0), 1.0)
    data = cv2.imencode(".jpg", smooth_HWC, [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()

    def work(_: int) -> int:
        image_HWC = np.empty_like(smooth_HWC)
        done, stop = 0, time.perf_counter() + seconds
        while time.perf_counter() < stop:
            decode.decode_image(data, image_HWC)
            done += 1
        return done

    threads = available_cpus()
    start = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        rate = sum(pool.map(work, range(threads))) / (time.perf_counter() - start)
    decoder = "cv2" if decode.simplejpeg is None else "simplejpeg"
    value = f"{rate:,.0f} images/s with {threads} threads ({decoder}, {len(data) / 1024:.1f} KiB each)"
    return judge("decode", value, "" if rate / threads >= DECODE_IMAGES_S else "slow: are other programs running?")


def check_ranks(timeout: float = 120.0) -> Finding:
    """Two real ranks (gloo; NCCL over all GPUs where there are several) add a number up."""
    import paddle

    num_gpus = paddle.device.cuda.device_count() if paddle.device.is_compiled_with_cuda() else 0
    backend, num_ranks, device = ("nccl", num_gpus, "gpu") if num_gpus > 1 else ("gloo", 2, "cpu")
    with tempfile.TemporaryDirectory() as folder:
        command = launch_command(num_ranks, Path(__file__).resolve(), [RANK_PROGRAM, device], folder)
        start = time.perf_counter()
        try:
            done = subprocess.run(
                command, env=rank_environment(device, 1), timeout=timeout, capture_output=True, text=True, check=False
            )
        except subprocess.TimeoutExpired:
            advice = "ranks cannot reach each other: check the firewall for loopback, NCCL_SOCKET_IFNAME, /dev/shm"
            return Finding(backend, f"{num_ranks} ranks hung for {timeout:.0f} s", "fail", advice)
        logs = "".join(path.read_text(errors="replace") for path in sorted(Path(folder).glob("workerlog.*")))
    spent = time.perf_counter() - start
    if done.returncode or logs.count(f"sum={num_ranks * (num_ranks + 1) // 2} ") != num_ranks:
        last = (logs or done.stderr).strip().splitlines()[-1:] or ["no output"]
        advice = "run again with NCCL_DEBUG=INFO or GLOG_v=3"
        return Finding(backend, f"{num_ranks} ranks failed: {last[0][:120]}", "fail", advice)
    milliseconds = float(logs.split("all_reduce_ms=")[1].split()[0])
    return Finding(backend, f"{num_ranks} ranks up in {spent:.0f} s, 25 MB all-reduce in {milliseconds:.0f} ms")


def rank_program(device: str) -> None:
    """Run by every launched rank of ``check_ranks``."""
    import paddle

    from utils import distributed

    distributed.init(device)
    rank = distributed.get_rank()
    total = int(distributed.all_reduce_sum(paddle.to_tensor([rank + 1])).item())
    payload = paddle.zeros([25 * MIB // 4], dtype="float32")
    distributed.all_reduce_sum(payload)
    start = time.perf_counter()
    float(distributed.all_reduce_sum(payload)[0])
    print(f"sum={total} all_reduce_ms={1e3 * (time.perf_counter() - start):.1f} ", flush=True)


def check_training(seconds: float) -> Finding:
    """Real steps of iresnet18 at 112x112 with a Partial FC head of 10,000 classes, on the device found."""
    import paddle

    from backbones import build_backbone
    from losses import build_margin
    from partial_fc import PartialFC

    gpu = paddle.device.is_compiled_with_cuda() and paddle.device.cuda.device_count() > 0
    paddle.set_device("gpu:0" if gpu else "cpu")
    paddle.seed(0)
    batch, num_classes = (128, 10_000) if gpu else (8, 10_000)
    backbone = build_backbone("iresnet18")
    head = PartialFC(num_classes, 512, build_margin("arcface"), sample_rate=0.1, seed=0)
    optimizer = paddle.optimizer.Momentum(0.05, 0.9, parameters=backbone.parameters(), weight_decay=5e-4)
    image_BCHW = paddle.randn([batch, 3, 112, 112]).clip(-1, 1)
    label_B = paddle.randint(0, num_classes, [batch], dtype="int64")
    losses, start, timed = [], time.perf_counter(), 0.0
    while len(losses) < 3 or time.perf_counter() - start < seconds:
        began = time.perf_counter()
        loss = head(backbone(image_BCHW), label_B)
        loss.backward()
        optimizer.step()
        head.step(0.05)
        optimizer.clear_grad()
        head.clear_grad()
        losses.append(float(loss))
        timed += time.perf_counter() - began if len(losses) > 1 else 0.0  # the first step allocates and compiles
    rate = batch * (len(losses) - 1) / timed
    value = f"iresnet18, batch {batch}: {rate:,.1f} images/s, loss {losses[0]:.2f} -> {losses[-1]:.2f}"
    if not all(abs(loss) < float("inf") for loss in losses):
        return Finding("training", value, "fail", "the loss is not finite: memory, driver or a broken Paddle build")
    rose = "the loss of one repeated batch did not fall; report this"
    return judge("training", value, "" if losses[-1] < losses[0] else rose)


def run_check(name: str, check: Callable[[], Finding]) -> Finding:
    """A check's own finding, or what stopped it."""
    try:
        return check()
    except Exception as error:  # a doctor reports what it finds, whatever it is
        text = " ".join(str(error).split())[:160]
        advice = "this check could not run; mend the lines above first"
        return Finding(name, f"{type(error).__name__}: {text}", "fail", advice)


def print_finding(finding: Finding) -> None:
    """One line, and one more for the advice."""
    print(f"{SYMBOL[finding.status]}  {finding.name:<9} {finding.value}", flush=True)
    if finding.advice:
        print(f"{'':16}-> {finding.advice}", flush=True)


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    """Run the checks in order; see the module's docstring."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == [RANK_PROGRAM]:
        rank_program(argv[1])
        return
    parser = CommandLine(__doc__)
    parser.add_argument("--data", type=Path, default=Path(), help="folder whose disk is measured (default: this one)")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of the training step; 0 skips it")
    parser.add_argument("--no-ranks", action="store_true", help="do not launch two ranks")
    parser.add_argument("--disk-mb", type=int, default=256, help="size of the file that measures the disk")
    parser.add_argument("--json", type=Path, help="write the findings there as well")
    args = parser.parse_args(argv)
    check_ranges(args, seconds=(0, 3600), disk_mb=POSITIVE)
    checks = {
        "python": check_python,
        "packages": check_packages,
        "paddle": check_paddle,
        "device": check_device,
        "threads": check_threads,
        "memory": check_memory,
        "shm": check_shm,
        "disk": lambda: check_disk(args.data, args.disk_mb),
        "decode": check_decode,
    }
    if not args.no_ranks:
        checks["ranks"] = check_ranks
    if args.seconds:
        checks["training"] = lambda: check_training(args.seconds)
    findings = []
    for name, check in checks.items():
        findings.append(run_check(name, check))
        print_finding(findings[-1])
    if args.json:
        args.json.write_text(json.dumps([asdict(finding) for finding in findings], indent=2) + "\n")
    counts = {status: sum(finding.status == status for finding in findings) for status in SYMBOL}
    print(f"{counts['ok']} ok, {counts['warn']} warnings, {counts['fail']} failures")
    if counts["fail"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
