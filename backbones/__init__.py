"""Backbones: image -> raw embedding. ``build_backbone`` picks one from a dict by name; one file holds one family."""

import difflib
import functools
import inspect
import numbers
from collections.abc import Callable

from paddle import nn

from backbones import iresnet, mnist, mobilefacenet, resnet, vit
from backbones.layers import Backbone
from utils.errors import UserError

BACKBONES: dict[str, Callable[..., nn.Layer]] = {
    **{name: functools.partial(iresnet.IResNet, depths=depths) for name, depths in iresnet.DEPTHS.items()},
    **{name: functools.partial(mobilefacenet.MobileFaceNet, **kw) for name, kw in mobilefacenet.SETTINGS.items()},
    **{name: functools.partial(vit.VisionTransformer, **kw) for name, kw in vit.SETTINGS.items()},
    **{name: functools.partial(resnet.ResNet, **kw) for name, kw in resnet.SETTINGS.items()},
    "resnet_face18": resnet.ResNetFace,
    "mnist_2d": mnist.MnistNet,
}
ALIASES = {
    "r18": "iresnet18",
    "r34": "iresnet34",
    "r50": "iresnet50",
    "r100": "iresnet100",
    "r200": "iresnet200",
    "mbf": "mobilefacenet",
    "mbf_large": "mobilefacenet_large",
}
# What makes a name of the registry that name; everything else in a class's signature is the user's to choose.
_FIXED = ("block", "common", "depth", "depths", "hidden_ratio")
_SIZES = {"embedding_size", "in_channels", "input_size", "width"}  # options that are whole numbers


def build_backbone(name: str, **options) -> nn.Layer:
    """A freshly initialised backbone.

    Args:
        name: a key of ``BACKBONES`` or ``ALIASES``.
        options: ``embedding_size`` (512), ``dropout`` (0.0), ``width``, ``input_size`` (112 pixels), ``recompute``
            (False), ``data_format`` (NCHW) and what the family adds; its class documents them. None stands for the
            default.

    Returns:
        A layer: float [B, 3, H, W] in [-1, 1] -> raw embedding [B, embedding_size]. It has ``input_size`` and
        ``embedding_size``.

    Raises:
        UserError: an unknown name (the nearest is named), an option that the family lacks, a size that is none.
    """
    canonical = resolve_name(name)
    known = available_options(canonical)
    for option in options:
        if option not in known:
            raise UserError(f"backbone {name!r} has no option {option!r}; it has {', '.join(known)}")
    for option in _SIZES & options.keys():
        value = options[option]
        if value is not None and (not isinstance(value, numbers.Integral) or value < 1):
            raise UserError(f"backbone {name!r}: {option} {value!r}: a whole number from 1 on is needed")
    return BACKBONES[canonical](**{option: value for option, value in options.items() if value is not None})


def resolve_name(name: str) -> str:
    """The registry key that ``name`` (a key or an alias) stands for; ValueError names the nearest otherwise."""
    if name in BACKBONES:
        return name
    if name in ALIASES:
        return ALIASES[name]
    nearest = difflib.get_close_matches(str(name), [*BACKBONES, *ALIASES], n=1, cutoff=0.0)[0]
    raise UserError(f"no backbone {name!r}; did you mean {nearest!r}? There are: {', '.join(sorted(BACKBONES))}")


def available_options(name: str) -> list[str]:
    """Names of the options that ``build_backbone(name, ...)`` takes."""
    own = inspect.signature(BACKBONES[resolve_name(name)]).parameters
    common = inspect.signature(Backbone).parameters if "common" in own else {}
    return [key for key in {**own, **common} if key not in _FIXED]
