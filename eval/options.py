"""Command line options that the evaluation scripts share."""

import argparse
from collections.abc import Iterable
from pathlib import Path

import paddle
from prettytable import PrettyTable

from eval.embed import ENGINES, PRECISIONS
from utils.text import plain

_WEIGHTS = (".pdparams", ".safetensors", ".pt", ".pth", ".ckpt", ".onnx")
_SUFFIXES = (*_WEIGHTS, ".npy", ".npz", ".bin", ".txt", ".csv", ".lst")


def add_device_option(parser: argparse.ArgumentParser) -> None:
    """Where it runs; ``utils.distributed.init`` takes it."""
    kinds = "auto (an accelerator where there is one), cpu, gpu, xpu, npu or another plug-in's"
    parser.add_argument("--device", default="auto", help=f"{kinds} (default: auto)")


def default_result_dir(model: str, kind: str) -> Path:
    """``<run>/<kind>`` for a run directory, else ``work_dirs/<kind>/<file name>``."""
    path = Path(model)
    return path / kind if path.is_dir() else Path("work_dirs") / kind / bare_name(path)


def bare_name(path: str | Path) -> str:
    """The file name without a suffix of ours; other dots belong to the name (``r50_lr0.1``)."""
    path = Path(path)
    return path.stem if path.suffix.lower() in _SUFFIXES else path.name


def add_model_options(parser: argparse.ArgumentParser, model_help: str, required: bool) -> None:
    """Which network, and how it runs."""
    parser.add_argument("--model", required=required, help=model_help)
    parser.add_argument("--network", help="backbone name, where the model does not say it")
    parser.add_argument("--which", default="last", choices=("last", "best"), help="weights of a run directory")
    parser.add_argument("--batch-size", type=int, default=64)
    add_engine_options(parser)
    add_device_option(parser)


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """How a network runs."""
    parser.add_argument("--engine", default="auto", help=f"auto (the fastest that works here), {', '.join(ENGINES)}")
    parser.add_argument(
        "--precision",
        default="fp32",
        help=f"one of {', '.join(PRECISIONS)}; bf16 where the processor computes in it, auto: bf16 if it passes a "
        "check on the first images (default: %(default)s, whose figures no processor changes)",
    )


def add_face_options(parser: argparse.ArgumentParser) -> None:
    """How faces are found in photos, or crops taken as they are."""
    parser.add_argument("--landmarks", type=Path, help="list of five points a face (see tools/embed.py)")
    parser.add_argument("--detector", help="mtcnn, or a YuNet .onnx file for OpenCV's FaceDetectorYN")
    parser.add_argument("--min-score", type=float, help="least detector score (default: YuNet 0.8, mtcnn 0.7)")
    parser.add_argument("--resize", action="store_true", help="resize crops of another size")


def add_report_options(parser: argparse.ArgumentParser, results: str) -> None:
    """Where results go. ``results``: what they are, for the help."""
    parser.add_argument("--num-errors", type=int, default=10, help="worst pairs shown")
    parser.add_argument("--label", help="name of this run in reports (default: the model's)")
    parser.add_argument("--result-dir", type=Path, help=f"where {results} go")
    parser.add_argument("--report", type=Path, help="also write one self-contained HTML page")
    parser.add_argument(
        "--compare", type=Path, nargs="*", default=[], help="result folders of other runs to set beside it"
    )


def shown_settings(args: argparse.Namespace, label: str, **more: object) -> dict:
    """The options as a report shows them; ``label`` where none was given."""
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    settings |= {"compare": [str(path) for path in args.compare], "paddle": paddle.__version__, **more}
    return settings | {"label": plain(args.label or label)}


def print_table(head: list[str], rows: list[list[str]]) -> None:
    """A table of text to the standard output."""
    table = PrettyTable(head)
    table.add_rows(rows)
    print(table, flush=True)


def print_warnings(warnings: Iterable[str]) -> None:
    """What makes the figures above mean less than they seem to, a line each."""
    for warning in warnings:
        print(f"warning: {warning}", flush=True)
