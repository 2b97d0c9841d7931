"""Pair verification on a training run's cadence: the sets are read when needed, every rank embeds its share."""

from pathlib import Path

from eval.bins import load_bin
from eval.pairs import check_set, verify
from eval.remarks import set_remarks
from utils.errors import UserError


class Verification:
    """Judges a backbone on ``.bin`` sets.

    Args:
        root: folder of the sets.
        names: ``<root>/<name>``, with or without ``.bin``, or paths of ``.bin`` files.
        input_size: height and width of the network's input, which all images are brought to.

    Raises:
        UserError: a set is missing (all that are missing are named), is no pair set, or has one pair.
    """

    def __init__(self, root: str | Path, names: tuple[str, ...], batch_size: int, input_size: int):
        paths: dict[str, Path] = {}
        for name in map(str.strip, names):
            path = Path(name if name.endswith(".bin") else f"{name}.bin")
            if not (name.endswith(".bin") and path.is_file()):
                path = Path(root) / path  # an absolute path stays as it is
            if path not in paths.values():
                paths[str(path) if path.stem in paths else path.stem] = path
        missing = [str(path) for path in paths.values() if not path.is_file()]
        if missing:
            remedy = "put them there, set verify.root, or drop them from verify.sets"
            raise UserError(f"verify.sets: {', '.join(missing)} missing; {remedy}")
        self.sets, self.batch_size = paths, batch_size
        warnings = []
        for name, path in paths.items():  # a set that cannot be judged ends the run now, not at the first verification
            images, same_P = load_bin(path, (input_size, input_size))
            check_set(str(path), same_P)
            warnings += [f"verify.sets: {name}: {remark}" for remark in set_remarks(images, same_P)]
        self.warnings = tuple(warnings)  # what makes the figures of these sets mean less than they seem to, a line each

    def __call__(self, backbone) -> dict[str, dict[str, float]]:
        """Figures by set, the same on all ranks. All ranks call it; every part of the backbone keeps its mode."""
        figures = {}
        for name, result in verify(backbone, self.sets, batch_size=self.batch_size).items():
            wanted = ("accuracy", "accuracy_std", "val", "far", "auc", "eer", "threshold")
            figures[name] = {key: float(getattr(result.metrics, key)) for key in wanted}
            figures[name] |= {"no_flip_accuracy": float(result.no_flip.accuracy), "xnorm": float(result.xnorm)}
        return figures
