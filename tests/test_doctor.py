"""The self-check: every judgement on hand-made values, the real checks on this machine, and its exit status."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tools import doctor

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("version", "status"), [((3, 9, 18), "fail"), ((3, 10, 0), "ok"), ((3, 12, 9), "ok"), ((3, 13, 0), "fail")]
)
def test_python_versions(version, status):
    assert doctor.check_python(version).status == status


def test_missing_packages_are_named():
    finding = doctor.check_packages(lambda name: name in ("yaml", "rich"))
    assert finding.status == "fail" and "yaml, rich" in finding.value and "make setup" in finding.advice
    finding = doctor.check_packages(lambda name: name == "simplejpeg")
    assert finding.status == "warn" and "simplejpeg" in finding.advice
    finding = doctor.check_packages(lambda name: name == "visualdl")
    assert finding.status == "ok" and "visualdl" in finding.value


@pytest.mark.parametrize(
    ("cpus", "omp", "status", "word"),
    [
        (2, "", "ok", "--nproc_per_node 2"),  # Paddle takes one thread: say how to use both cores
        (2, "2", "ok", ""),
        (2, "8", "warn", "at most 2"),
        (4, "many", "warn", "positive"),
        (4, "0", "warn", "positive"),
        (1, "", "ok", ""),
    ],
)
def test_threads(cpus, omp, status, word):
    finding = doctor.check_threads(cpus, omp)
    assert finding.status == status and word in finding.advice


def test_shared_memory(tmp_path):
    assert doctor.check_shm(str(tmp_path), needed=1).status == "ok"
    short = doctor.check_shm(str(tmp_path), needed=1 << 60)
    assert short.status == "warn" and "--shm-size" in short.advice
    assert doctor.check_shm(str(tmp_path / "none")).status == "ok"  # threads need none of it


def test_disk_leaves_nothing_behind(tmp_path):
    finding = doctor.check_disk(tmp_path, megabytes=2)
    read, write = (float(part.split()[0].replace(",", "")) for part in finding.value.split(",  ")[0].split(", ")[:2])
    assert read > 0 and write > 0
    assert list(tmp_path.iterdir()) == []


def test_a_slow_disk_gets_advice(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "DISK_MIB_S", 1e12)
    assert "SSD" in doctor.check_disk(tmp_path, megabytes=1).advice


def test_decode_rate_is_a_rate(monkeypatch):
    finding = doctor.check_decode(seconds=0.1)
    assert 50 < float(finding.value.split()[0].replace(",", "")) < 100_000 * doctor.available_cpus()
    monkeypatch.setattr(doctor, "DECODE_IMAGES_S", 1e12)
    assert doctor.check_decode(seconds=0.05).status == "warn"


def test_a_check_that_breaks_is_a_finding():
    def broken():
        raise RuntimeError("no such\nlibrary")

    finding = doctor.run_check("gpu", broken)
    assert finding.status == "fail" and finding.value == "RuntimeError: no such library"


@pytest.mark.distributed
def test_two_real_ranks():
    finding = doctor.check_ranks()
    assert finding.name in ("gloo", "nccl") and finding.status == "ok" and "2 ranks" in finding.value


def test_a_rank_that_fails_is_told(monkeypatch):
    monkeypatch.setattr(doctor, "RANK_PROGRAM", "--no-such-flag")
    finding = doctor.check_ranks()
    assert finding.status == "fail" and "ranks failed" in finding.value


def test_main_writes_json_and_its_exit_status_says_failure(tmp_path, capsys, monkeypatch):
    arguments = ["--seconds", "0", "--no-ranks", "--disk-mb", "1", "--data", str(tmp_path)]
    doctor.main([*arguments, "--json", str(tmp_path / "doctor.json")])
    findings = json.loads((tmp_path / "doctor.json").read_text())
    assert [f["name"] for f in findings] == [
        "python", "packages", "paddle", "device", "threads", "memory", "shm", "disk", "decode",
    ]  # fmt: skip
    assert all(set(f) == {"name", "value", "status", "advice"} for f in findings)
    monkeypatch.setattr(doctor, "check_memory", lambda: doctor.Finding("memory", "0", "fail", "buy some"))
    with pytest.raises(SystemExit) as stopped:
        doctor.main(arguments)
    assert stopped.value.code == 1
    assert "FAIL  memory" in capsys.readouterr().out


def test_nonsense_is_one_line():
    command = [sys.executable, str(ROOT / "tools" / "doctor.py"), "--seconds", "-3"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 1 and done.stderr.startswith("error: --seconds -3") and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_the_training_step():
    finding = doctor.check_training(10.0)
    assert finding.status == "ok" and "images/s" in finding.value


def test_one_real_operation_tells_a_device_that_works():
    assert doctor.failing_operation("cpu") is None
    assert "status" in doctor.failing_operation("no_such_device:0")


def test_a_folder_that_is_not_there_is_not_made(tmp_path):
    finding = doctor.check_disk(tmp_path / "nope", megabytes=1)
    assert finding.status == "fail" and "no such folder" in finding.value and not (tmp_path / "nope").exists()
