"""The configuration of a run: typed, frozen, checked before anything heavy is imported.

A YAML file holds one mapping a section; ``section.key=value`` on the command line overrides it, the value being YAML::

    config = load_config("configs/ms1mv2_r50.yaml", ["run.epochs=2", "head.margin.name=cosface"])

A wrong key or value raises ``ConfigError``: one line with the file, the setting, the value and the nearest valid name.
Every default stands below beside its meaning and unit; ``steps`` are updates (not micro-batches).
"""

import difflib
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from utils.errors import CommandLine, UserError


class ConfigError(UserError):
    """A configuration that cannot be used; the message is one line."""


def _listed(value: Any) -> Any:
    """``lfw`` or ``lfw,cfp_fp`` where a list is wanted."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


LARGEST = 2**31 - 1  # of a whole number
PositiveInt = Annotated[int, Field(ge=1, le=LARGEST)]
NonNegativeInt = Annotated[int, Field(ge=0, le=LARGEST)]
FilePath = Annotated[str, AfterValidator(os.path.expanduser)]  # ~ and ~user are home folders
Names = Annotated[tuple[str, ...], BeforeValidator(_listed)]
FilePaths = Annotated[tuple[FilePath, ...], BeforeValidator(_listed)]


class Section(BaseModel):
    """Frozen; unknown keys are errors; NaN and infinity are no numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML's yes and true are no 1, for which pydantic would take them."""
        if isinstance(value, bool) and "bool" not in str(cls.model_fields[info.field_name].annotation):
            raise PydanticCustomError("truth", "input should not be true or false")
        return value

    def kwargs(self) -> dict[str, Any]:
        """What is set, but for the name: keyword arguments for what the section describes."""
        return self.model_dump(exclude={"name", "network"}, exclude_none=True)


class RunConfig(Section):
    """What is run, where, and how long."""

    output: FilePath | None = None  # run directory; work_dirs/<name of the YAML file> if not given
    seed: NonNegativeInt = 2048
    device: str = "auto"  # auto: an accelerator where there is one, else cpu; or cpu, gpu, xpu, npu, ...
    epochs: PositiveInt = 20
    max_steps: NonNegativeInt = 0  # stop after so many updates (the schedule then ends there); 0: by epochs
    batch_size: PositiveInt = 128  # images of one rank in one micro-batch
    accumulation: PositiveInt = 1  # micro-batches an update, averaged
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # of the backbone; the head's softmax is always float32
    loss_scale: PositiveFloat = 65536.0  # initial fp16 loss scale, adapted while running
    compile: bool = False  # paddle.jit.to_static for the backbone
    sync_bn: bool = False  # batch-norm statistics over all ranks
    ema: float = Field(0.0, ge=0, lt=1)  # decay of an averaged copy of the backbone; 0: none
    max_skips: PositiveInt = 50  # stop after so many non-finite updates in a row
    deterministic: bool = False  # on a GPU: convolutions by algorithms that repeat bit for bit, at some speed
    hang_timeout: NonNegativeFloat = 1800.0  # seconds without a finished step before a rank gives up; 0: never


class DataConfig(Section):
    """Where the images come from."""

    kind: Literal["rec", "folder", "list", "celeba", "mnist", "synthetic", "wds"] = "rec"
    # folder of the data set, pattern of shards; several: one set (of any kinds)
    root: FilePath | tuple[FilePath, ...] | None = None
    prefix: str = "train"  # rec: <root>/<prefix>.rec
    list_file: FilePath | None = None  # list: file of "path label" lines
    num_classes: PositiveInt | None = None  # identities; None: as many as the data says
    relabel: bool = False  # number the labels that occur 0, 1, ... (labels.json in the run says which was which)
    shared_identities: bool | FilePath = False  # several sets: true: equal names are one person; or a file that tells
    weights: tuple[PositiveFloat, ...] = ()  # several sets: how often an epoch draws each image of a set; () is once
    num_images: PositiveInt | None = None  # synthetic: images an epoch; others: read from the data
    image_size: PositiveInt | None = None  # synthetic: side of the images made; None: model.input_size
    resize: bool | Literal["stretch", "crop", "window"] = False  # False: images of another size are an error
    split: Literal["train", "test"] | None = None  # mnist
    num_threads: PositiveInt = 2  # decoder threads of one rank
    prefetch: PositiveInt = 4  # batches decoded ahead
    flip: bool = True  # mirror each image with probability one half
    augment: dict[str, dict[str, bool | float]] = {}  # name -> parameters, see utils/data/augment.py; none by default

    @property
    def folder(self) -> str | None:
        """Where verification sets lie unless ``verify.root`` says: the data set, the first one of several."""
        return self.root[0] if isinstance(self.root, tuple) and self.root else self.root or None


class ModelConfig(Section):
    """``network`` and exactly the keyword arguments of ``backbones.build_backbone``; None: the backbone's default."""

    network: str = "iresnet50"
    embedding_size: PositiveInt = 512
    dropout: float = Field(0.0, ge=0, lt=1)
    width: PositiveInt | None = None
    input_size: PositiveInt = 112
    recompute: bool | None = None  # forget activations, compute them again in backward
    data_format: Literal["NCHW", "NHWC"] | None = None
    in_channels: PositiveInt | None = None
    pool: Literal["avg", "flatten"] | None = None
    se: bool | None = None
    mask_ratio: float | None = Field(None, ge=0, lt=1)
    drop_path: float | None = Field(None, ge=0, lt=1)


class MarginConfig(Section):
    """``losses.build_margin(name, **kwargs)``; None: the margin's own default."""

    name: Annotated[str, AfterValidator(str.lower)] = "arcface"
    s: PositiveFloat | None = None  # scale of the logits
    m: float | None = None
    m1: float | None = None  # cos(m1 * theta + m2) - m3
    m2: float | None = None
    m3: float | None = None
    easy_margin: bool | None = None
    gradient: Literal["exact", "straight_through"] | None = None
    beyond_pi: Literal["cosine", "linear"] | None = None  # where theta + m exceeds pi
    interclass_threshold: float | None = Field(None, ge=0, le=1)  # non-targets above this cosine are dropped; 0: off
    focal_gamma: NonNegativeFloat | None = None
    focal_over: Literal["batch", "sample"] | None = None
    h: float | None = None  # AdaFace
    t_alpha: float | None = None  # AdaFace
    l_a: float | None = None  # MagFace: norm range, margin range and weight of its loss term
    u_a: float | None = None
    l_m: float | None = None
    u_m: float | None = None
    lambda_g: float | None = None
    lambda_min: float | None = None  # SphereFace's annealing
    lambda_base: float | None = None
    lambda_gamma: float | None = None


class HeadConfig(Section):
    """The class-sharded softmax head (Partial FC)."""

    margin: MarginConfig = MarginConfig()
    sample_rate: float = Field(1.0, ge=0, le=1)  # share of the classes in a step's softmax; 0: positives only
    optimizer: Literal["sgd", "adamw"] | None = None  # None: as the backbone (LARS: sgd)
    update: Literal["dense", "sampled"] = "dense"  # what unsampled rows go through: momentum and decay, or nothing
    momentum: float | None = Field(None, ge=0, lt=1)  # None: as optim
    weight_decay: NonNegativeFloat | None = None  # None: as optim
    lr_scale: PositiveFloat = 1.0  # the head's learning rate is lr times this
    matmul_dtype: Literal["fp32", "tf32", "bf16"] = "fp32"  # class products on GPU; tf32 where the card has it
    chunk: PositiveInt | None = None  # classes handled at a time; None: chosen for the device


class OptimConfig(Section):
    """How the backbone is updated."""

    name: Literal["sgd", "adamw", "lars"] = "sgd"
    lr: NonNegativeFloat = 0.1
    lr_batch: PositiveInt | None = None  # lr is meant for this global batch and scaled linearly; None: taken as it is
    momentum: float = Field(0.9, ge=0, lt=1)
    nesterov: bool = False
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.999, ge=0, lt=1)
    epsilon: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 5e-4
    decay_norm_bias: bool = True  # False: norms and biases are not decayed
    trust: PositiveFloat = 0.001  # LARS
    clip_norm: NonNegativeFloat = 5.0  # global norm of the backbone's gradient; 0: no clipping
    backbone_lr_scale: NonNegativeFloat = 1.0  # fine-tuning: the backbone's learning rate is lr times this


class ScheduleConfig(Section):
    """Learning rate over updates, warm-up from the first one."""

    name: Literal["poly", "step", "multistep", "cosine", "constant"] = "poly"
    warmup_epochs: NonNegativeFloat = 0.0
    warmup_steps: NonNegativeInt = 0  # instead of warmup_epochs
    power: PositiveFloat = 1.0  # poly
    milestones: tuple[PositiveFloat, ...] = ()  # step, multistep: epochs; "step" is arcface-Paddle's (one epoch early)
    gamma: PositiveFloat = 0.1  # step, multistep
    min_lr: NonNegativeFloat = 0.0  # poly, cosine


class VerifyConfig(Section):
    """Pair verification while training."""

    root: FilePath | None = None  # folder of the .bin sets; None: data.root
    sets: FilePaths = ()  # names (<root>/<name>.bin) or paths
    every_steps: NonNegativeInt = 2000  # 0: only at the end
    at_end: bool = True
    batch_size: PositiveInt = 64
    patience: NonNegativeInt = 0  # stop after so many verifications without a new best mean accuracy; 0: never


class CheckpointConfig(Section):
    """What survives, and how often it is written."""

    every_steps: NonNegativeInt = 2000  # 0: only at the end
    keep: PositiveInt = 3  # newest ones kept, the best beside them
    asynchronous: bool = True  # the loop waits only for the copy
    resume: FilePath = "never"  # never | auto (the latest usable one if there is one) | latest | path of a checkpoint


class LogConfig(Section):
    """What is logged, and how often."""

    every_steps: PositiveInt = 50
    tensorboard: bool = True
    visualdl: bool = False
    angles: bool = True  # theta to the own and to the nearest other class, on each logged step
    plane_every_steps: NonNegativeInt = 0  # 2-D embeddings: draw the plane so often; 0: never
    plane_beside: FilePath | None = None  # run directory whose plane is drawn on the left of ours
    samples: NonNegativeInt = 0  # training images shown in the event file at start
    spike: PositiveFloat = 3.0  # a loss so many standard deviations and half its running mean above that is logged


class InitConfig(Section):
    """Weights to start from (fine-tuning); ``--resume`` takes precedence."""

    backbone: FilePath | None = None
    head: FilePath | None = None
    optional: bool = False  # start from nothing where a file is not there, instead of ending
    freeze: Names = ()  # leading parts of parameter names, e.g. [conv1, bn1, layer1]


class Config(Section):
    """One run."""

    run: RunConfig = RunConfig()
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    head: HeadConfig = HeadConfig()
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    verify: VerifyConfig = VerifyConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    init: InitConfig = InitConfig()

    def head_options(self) -> dict[str, Any]:
        """Keyword arguments of ``PartialFC`` beyond classes, margin, ranks, seed; unset ones follow ``optim``."""
        head, optim = self.head, self.optim
        optimizer = head.optimizer or ("adamw" if optim.name == "adamw" else "sgd")
        return {
            "sample_rate": head.sample_rate,
            "optimizer": optimizer,
            "update": "sampled" if optimizer == "adamw" else head.update,
            "momentum": optim.momentum if head.momentum is None else head.momentum,
            "weight_decay": optim.weight_decay if head.weight_decay is None else head.weight_decay,
            "betas": (optim.beta1, optim.beta2),
            "epsilon": optim.epsilon,
            "matmul_dtype": head.matmul_dtype,
            "chunk_rows": head.chunk,
        }

    def source_options(self) -> dict[str, Any]:
        """Keyword arguments of ``dataset.build_source`` for this kind of data; ConfigError if the place is not set."""
        data, several = self.data, isinstance(self.data.root, tuple)
        if several and not data.root:
            raise ConfigError("data.root: () names no data set; give a path, or a list of paths")
        for name, value in (("weights", data.weights), ("shared_identities", data.shared_identities)):
            if value and not several:
                raise ConfigError(f"data.{name}: {value!r} is for several sets: data.root=[a, b]")
        if several:
            return data.model_dump(include={"root", "relabel", "prefix", "weights", "shared_identities"})
        needed = "list_file" if data.kind == "list" else "root"
        if data.kind not in ("mnist", "synthetic") and getattr(data, needed) is None:
            raise ConfigError(f"data.{needed}: not set; say where the data of kind {data.kind!r} lies")
        if data.kind == "synthetic":
            return {
                "num_classes": data.num_classes or 100,
                "num_images": data.num_images or 10000,
                "image_size": data.image_size or self.model.input_size,
            }
        extra = {"rec": {"prefix"}, "list": {"list_file"}, "mnist": {"split"}}.get(data.kind, set())
        return data.model_dump(include={"root", "relabel"} | extra, exclude_none=True)

    def loader_options(self) -> dict[str, Any]:
        """Keyword arguments of ``dataset.build_train_loader`` beyond source, batch, ranks, seed."""
        options = self.data.model_dump(include={"num_threads", "augment", "flip", "resize", "prefetch"})
        return {**options, "image_size": self.model.input_size}

    def schedule_options(self, steps_per_epoch: int) -> dict[str, Any]:
        """Keyword arguments of ``LrSchedule`` beyond the learning rate."""
        run, plan = self.run, self.schedule
        return {
            **plan.model_dump(exclude={"warmup_epochs"}),
            "steps_per_epoch": steps_per_epoch,
            "total_steps": run.max_steps or run.epochs * steps_per_epoch,
            "warmup_steps": plan.warmup_steps or round(plan.warmup_epochs * steps_per_epoch),
        }

    def optimizer_options(self) -> dict[str, Any]:
        """Keyword arguments of ``BackboneOptimizer``."""
        return self.optim.model_dump(exclude={"lr", "lr_batch", "clip_norm", "backbone_lr_scale"})

    @model_validator(mode="after")
    def _consistent(self) -> "Config":
        if self.schedule.name in ("step", "multistep") and not self.schedule.milestones:
            raise ValueError(f"schedule.milestones: () with schedule.name={self.schedule.name}; list the epochs")
        if self.schedule.warmup_epochs and self.schedule.warmup_steps:
            raise ValueError("schedule.warmup_steps and schedule.warmup_epochs are both set; give one of them")
        if self.verify.patience and not self.verify.sets:
            raise ValueError(f"verify.patience: {self.verify.patience} without verify.sets; name the .bin sets")
        return self


class _UniqueKeys(yaml.SafeLoader):
    """YAML in which a key that stands twice in one mapping is an error (the last would win without a word)."""

    def construct_mapping(self, node, deep=False):
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and key.value != "<<" and lines.setdefault(key.value, line) != line:
                first = lines[key.value]
                raise ConfigError(f"{key.value!r} stands twice, in lines {first} and {line}; keep one of them")
        return super().construct_mapping(node, deep)


def load_config(path: str | Path | None = None, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read a YAML file, apply ``section.key=value`` overrides, check everything.

    Without ``path`` the defaults; an override is ``optim.lr=0.02``, its value YAML. ConfigError if something is wrong.
    """
    tree: Any = {}
    if path is not None:
        path = Path(path).expanduser()
        try:
            tree = yaml.load(path.read_text(encoding="utf-8-sig"), _UniqueKeys)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror or error}; give the path of a YAML configuration") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: no valid YAML: {' '.join(str(error).split())}") from None
        except RecursionError:
            raise ConfigError(f"{path}: brackets or blocks are nested too deeply to be a configuration") from None
        tree = {} if tree is None else tree
        if not isinstance(tree, dict):
            raise ConfigError(f"{path}: {str(tree)[:60]!r} is no mapping of sections such as 'run:' and 'data:'")
    tree = {name: {} if section is None else section for name, section in tree.items()}
    before = _margin(tree)
    for override in overrides:
        _apply_override(tree, override)
    note = _drop_other_margin(tree, before, overrides)
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{path or 'configuration'}: {_explain(error)}") from None
    if note and os.environ.get("PADDLE_TRAINER_ID", "0") == "0":
        print(note, file=sys.stderr, flush=True)
    if config.run.output is None:
        name = Path(path).stem if path is not None else "run"
        config = config.model_copy(update={"run": config.run.model_copy(update={"output": f"work_dirs/{name}"})})
    return config


def parse_arguments(argv: list[str] | None, default: Path, description: str) -> Config:
    """What ``train.py``'s command line asks for (arcface-Paddle's flags included), of ``default`` if no file."""
    parser = CommandLine(description)
    parser.add_argument("words", nargs="*", metavar="CONFIG.yaml section.key=value", help=f"default: {default.name}")
    parser.add_argument("--config", help="the configuration file, for those used to the flag")
    parser.add_argument("--network", help="short for model.network=")
    parser.add_argument("--loss", help="short for head.margin.name= (ArcFace, CosFace, ...)")
    told = "go on from the run's newest checkpoint (or 1), or from a PATH; 0: no"
    parser.add_argument("--resume", nargs="?", const="latest", help=told)
    arguments = parser.parse_intermixed_args(argv)
    words, resume = arguments.words, arguments.resume
    if resume and (resume.endswith((".yaml", ".yml")) or _is_override(resume)):  # argparse took the next word for it
        words, resume = [*words, resume], "latest"
    files = [word for word in words if not _is_override(word)] + ([arguments.config] if arguments.config else [])
    overrides = [word for word in words if _is_override(word)]
    if len(files) > 1:
        raise ConfigError(f"one configuration file, please; got {', '.join(files)} (overrides are section.key=value)")
    flags = {
        "model.network": arguments.network,
        "head.margin.name": arguments.loss and arguments.loss.lower(),
        "checkpoint.resume": {"0": "never", "1": "latest"}.get(resume, resume),
    }
    overrides += [f"{name}={json.dumps(value)}" for name, value in flags.items() if value is not None]
    return load_config(files[0] if files else default, overrides)


def _is_override(word: str) -> bool:
    """``section.key=value`` rather than a path with a ``=`` in it."""
    name = word.partition("=")[0]
    section = name.partition(".")[0].strip()
    if "=" not in word or "/" in name or Path(word).expanduser().exists():
        return False
    return section in Config.model_fields or not word.endswith((".yaml", ".yml"))


# Parameters that mean the same with every margin.
_COMMON = ("s", "gradient", "interclass_threshold", "focal_gamma", "focal_over")
_NO_SCALE = ("linear", "sphereface")  # logits of plain softmax, and of the embedding's own norm


def _margin(tree: dict) -> dict:
    """A copy of ``head.margin``, empty where there is none (or none that is a mapping, which is an error later)."""
    head = tree.get("head")
    margin = head.get("margin") if isinstance(head, dict) else None
    return dict(margin) if isinstance(margin, dict) else {}


def _drop_other_margin(tree: dict, before: dict, overrides: list[str] | tuple[str, ...]) -> str | None:
    """An override that switches the margin leaves the file's parameters of the other one behind; the note of it."""
    margin = _margin(tree)
    old, new = (str(each.get("name", "arcface")).lower() for each in (before, margin))
    if old == new:
        return None
    given = {word.partition("=")[0].strip().rpartition(".")[2] for word in overrides if word.startswith("head.margin.")}
    kept = [name for name in _COMMON if name != "s" or new not in _NO_SCALE]
    dropped = {key: before[key] for key in before if key != "name" and key not in given and key not in kept}
    tree["head"] = {**tree["head"], "margin": {key: value for key, value in margin.items() if key not in dropped}}
    if not dropped:
        return None
    told = ", ".join(f"{key}={value}" for key, value in dropped.items())
    return f"head.margin: {new} instead of {old}, whose {told} is dropped; head.margin.KEY=VALUE sets {new}'s own"


def fresh(config: Config) -> Config:
    """The configuration as a run keeps it: without the resume, which whoever starts it again must ask for."""
    return config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update={"resume": "never"})})


def dump_config(config: Config) -> str:
    """YAML text that ``load_config`` reads back to an equal configuration; unset optional keys are left out."""
    return yaml.safe_dump(config.model_dump(mode="json", exclude_none=True), sort_keys=False)


def setting_names(section: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """Every dotted setting name, sections included, e.g. ``run``, ``run.seed``, ``head.margin.s``."""
    names = []
    for key, field in section.model_fields.items():
        names.append(prefix + key)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            names += setting_names(field.annotation, f"{prefix}{key}.")
    return names


def _apply_override(tree: dict, override: str) -> None:
    name, equals, text = override.partition("=")
    keys = name.strip().split(".")
    if not equals or len(keys) < 2 or not all(keys):
        raise ConfigError(f"override {override!r}: write section.key=value, e.g. optim.lr=0.02")
    # The names of augmentations are checked where they are built.
    if name.strip() not in setting_names() and not name.strip().startswith("data.augment."):
        raise ConfigError(f"override {override!r}: {_unknown(name.strip())}")
    try:
        value = yaml.safe_load(text) if text else None
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: no valid YAML value: {' '.join(str(error).split())}") from None
    node = tree
    for key in keys[:-1]:
        if node.get(key) is None:
            node[key] = {}
        node = node[key]
        if not isinstance(node, dict):
            raise ConfigError(f"override {override!r}: {key!r} holds {node!r} in the file, not a section")
    node[keys[-1]] = value


def _unknown(name: str) -> str:
    """``unknown setting 'x'; did you mean 'y'?`` with the nearest name, dotted, of the same section if there is one."""
    known = setting_names()
    section, _, leaf = name.rpartition(".")
    siblings = [candidate for candidate in known if candidate.rpartition(".")[0] == section]
    same_leaf = [candidate for candidate in known if candidate.rpartition(".")[2] == leaf]
    nearest = (
        difflib.get_close_matches(name, siblings, n=1, cutoff=0.75)
        or same_leaf[:1]
        or difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        or difflib.get_close_matches(name, siblings or known, n=1, cutoff=0.0)
    )
    return f"unknown setting {name!r}; did you mean {nearest[0]!r}?"


def _explain(error: ValidationError) -> str:
    """The first few problems of a validation, as one line."""
    problems = []
    for problem in error.errors()[:4]:
        name = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            problems.append(_unknown(name))
        elif not name:
            problems.append(problem["msg"].removeprefix("Value error, "))
        else:
            problems.append(f"{name}: {problem['input']!r}: {problem['msg'][0].lower()}{problem['msg'][1:]}")
    return "; ".join(problems)
