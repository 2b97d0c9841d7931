"""Embed faces in photos.

    python tools/embed.py crops/ --model work_dirs/run --output faces.npz                       # aligned 112x112 crops
    python tools/embed.py photos/ --model work_dirs/run --landmarks points.txt --output faces.npz
    python tools/embed.py photos/ --model w600k_r50.onnx --detector yunet.onnx --output faces.npz

``--landmarks``: lines ``name x1 y1 ... x5 y5`` (eyes, nose, mouth corners, left to right as seen). ``--detector``: your
YuNet file for OpenCV's FaceDetectorYN; the largest face of a photo, or every one with ``--all-faces``; photos without a
face are named and left out. The output holds ``embedding`` float32 [N, D] (unit length; embedding plus that of the
mirror image), ``norm`` [N] (before scaling), ``path`` [N], ``score`` [N] (the detector's) and ``landmark`` [N, 5, 2]
where there are any. Big folders stream at flat memory; an interrupted run goes on; ranks of a launcher share the work.
"""

import argparse
import json
import sys
import zlib  # noqa: F401 - before paddle: 2.6 exports a zlib of its own, on which Python's then crashes
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from eval.embed import load_embedder
from eval.options import add_face_options, add_model_options, print_warnings
from eval.remarks import landmark_remarks
from eval.stream import claimed, digest, embed_to_file
from utils import distributed
from utils.errors import POSITIVE, CommandLine, UserError, check_ranges, one_line_errors
from utils.files import written_whole
from utils.photos.detect import build_detector
from utils.photos.faces import AlignedFaces, Face, detect_faces, find_images, read_landmarks
from utils.vectors import row_norms


def collect_faces(args: argparse.Namespace) -> list[Face]:
    """What to embed: crops as they are, faces of a landmark list, or what the detector finds."""
    if args.landmarks is not None:
        return read_landmarks(args.landmarks, args.source if args.source.is_dir() else args.source.parent)
    paths = find_images(args.source)
    if args.detector is None:
        return [Face(path) for path in paths]
    faces, empty = detect_faces(paths, build_detector(args.detector, args.min_score), args.all_faces)
    if empty:
        names = ", ".join(str(path) for path in empty[:5]) + (" ..." if len(empty) > 5 else "")
        print(f"no face found in {len(empty)} of {len(paths)} photos: {names}", file=sys.stderr)
    if not faces:
        raise UserError(f"{args.source}: no face found in {len(paths)} photos; lower --min-score?")
    return faces


def save_faces(output: Path, faces: list[Face], embedding_ND: np.ndarray) -> None:
    """Write the ``.npz`` in one piece."""
    norm_N = row_norms(embedding_ND)
    bad = np.flatnonzero(~(norm_N > 0) | ~np.isfinite(norm_N))
    if len(bad):
        raise UserError(f"{faces[bad[0]].path}: its embedding is zero or not finite; check the weights")
    content = {
        "embedding": embedding_ND / norm_N[:, None],
        "norm": norm_N,
        "path": np.array([str(face.path) for face in faces]),
        "score": np.array([face.score for face in faces], np.float32),
    }
    if all(face.landmark_52 is not None for face in faces):
        content["landmark"] = np.stack([face.landmark_52 for face in faces]).astype(np.float32)
    with written_whole(output) as aside:
        np.savez(aside, **content)


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = CommandLine(__doc__)
    parser.add_argument("source", type=Path, help="an image, or a folder that is searched to the bottom")
    parser.add_argument("--output", type=Path, required=True, help=".npz file to write")
    parser.add_argument("--all-faces", action="store_true", help="every face of a photo, not the largest alone")
    parser.add_argument("--no-flip", action="store_true", help="without the mirror image's embedding")
    add_face_options(parser)
    add_model_options(parser, "run directory, weights file or .onnx", required=True)
    args = parser.parse_args(argv)
    check_ranges(args, batch_size=POSITIVE, min_score=(0, 1))
    if args.output.suffix != ".npz":
        raise UserError(f"--output {args.output}: the name must end in .npz")
    if args.landmarks is not None and args.detector is not None:
        raise UserError("--landmarks and --detector exclude each other")
    distributed.init(args.device)
    with claimed(args.output.parent, "name another --output", f"{args.output.name}.owner"):
        faces, embedder, stamps = [], None, None
        with distributed.together():
            faces = collect_faces(args)
            embedder = load_embedder(
                args.model, args.network, args.engine, args.batch_size, which=args.which, precision=args.precision
            )
            stamps = [(file.st_size, file.st_mtime_ns) for file in (face.path.stat() for face in faces)]
        images = AlignedFaces(faces, embedder.input_size, resize=args.resize)
        raw = args.output.with_name(f".{args.output.name}.raw.npy")
        embedding_ND = embed_to_file(
            embedder,
            images,
            raw,
            flip="none" if args.no_flip else "add",
            key=digest([(face.path, face.landmark_52) for face in faces]),
            stamps=stamps,
            flagged=images.outside.__contains__,
            record={},
            name_of=lambda index: faces[index].path,
        )
        if distributed.get_rank() != 0:
            return
        record = Path(f"{raw}.json")
        try:
            num_outside = json.loads(record.read_text(encoding="utf-8"))["flagged"]
            save_faces(args.output, faces, np.asarray(embedding_ND))
        finally:
            raw.unlink(missing_ok=True)
            record.unlink(missing_ok=True)
    print_warnings(landmark_remarks(num_outside, len(faces)))
    print(f"{len(faces)} faces by {embedder.engine}, {embedder.embedding_size} numbers each: {args.output}")


if __name__ == "__main__":
    main()
