"""config.py: YAML, overrides, nearest names, frozenness; every file in configs/ loads and fits its code."""

from pathlib import Path

import pytest

from config import ConfigError, dump_config, load_config, parse_arguments, setting_names

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def write(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return path


def test_values_come_from_file_then_override(tmp_path):
    path = write(tmp_path, "optim: {lr: 0.2, momentum: 0.8}\nhead:\n  margin: {name: cosface}\n")
    config = load_config(path, ["optim.lr=1e-3", "head.margin.m=0.4", "verify.sets=[lfw, cfp_fp]", "data.root=null"])
    assert (config.optim.lr, config.optim.momentum) == (1e-3, 0.8)
    assert config.head.margin.kwargs() == {"m": 0.4}
    assert config.verify.sets == ("lfw", "cfp_fp")
    assert config.run.output == "work_dirs/c"


def test_frozen():
    config = load_config()
    with pytest.raises(ValueError):
        config.optim.lr = 3.0


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("optm.lr=3", "optim.lr"),
        ("optim.lrr=1", "optim.lr"),
        ("head.margins.s=3", "head.margin.s"),
        ("run.batchsize=4", "run.batch_size"),
        ("model.sample_rate=0.1", "head.sample_rate"),
        ("verify.sett=[lfw]", "verify.sets"),
    ],
)
def test_unknown_override_names_the_nearest(override, nearest):
    with pytest.raises(ConfigError) as error:
        load_config(None, [override])
    assert f"did you mean {nearest!r}?" in str(error.value)
    assert override.partition("=")[0] in str(error.value)
    assert "\n" not in str(error.value)


def test_unknown_key_in_a_file_names_file_and_nearest(tmp_path):
    path = write(tmp_path, "optim: {learning_rate: 0.1}\nschedul: {name: poly}\n")
    with pytest.raises(ConfigError) as error:
        load_config(path)
    message = str(error.value)
    assert message.startswith(str(path)) and "\n" not in message
    assert "'optim.learning_rate'" in message and "did you mean 'schedule'?" in message


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("run.seed=abc", "run.seed: 'abc'"),
        ("run.batch_size=0", "run.batch_size: 0"),
        ("optim.lr=.nan", "optim.lr"),
        ("run.precision=fp8", "run.precision: 'fp8'"),
        ("head.sample_rate=1.5", "head.sample_rate: 1.5"),
        ("schedule.name=step", "schedule.milestones"),
        ("optim", "section.key=value"),
        ("lr=3", "section.key=value"),
        ("optim.lr=[", "no valid YAML"),
    ],
)
def test_bad_values_are_named_in_one_line(override, told):
    with pytest.raises(ConfigError) as error:
        load_config(None, [override])
    assert told in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["just words", "- a\n- list", "a: [", "\x00"])
def test_files_that_are_no_configuration(tmp_path, text):
    with pytest.raises(ConfigError) as error:
        load_config(write(tmp_path, text))
    assert "c.yaml" in str(error.value) and "\n" not in str(error.value)


def test_missing_file():
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        load_config("nowhere.yaml")


def test_empty_sections_mean_defaults(tmp_path):
    assert load_config(write(tmp_path, "verify:\noptim:\n")).optim == load_config().optim


def test_dump_reads_back_equal(tmp_path):
    config = load_config(None, ["verify.sets=[lfw]", "data.augment.blur.probability=0.3", "head.margin.m=0.4"])
    assert load_config(write(tmp_path, dump_config(config))) == config


def test_model_section_is_what_build_backbone_takes():
    config = load_config(None, ["model.network=iresnet18", "model.width=32"])
    assert config.model.kwargs() == {"embedding_size": 512, "dropout": 0.0, "width": 32, "input_size": 112}


def test_ancestor_flags_and_their_order(tmp_path):
    path = write(tmp_path, "optim: {lr: 0.2}\n")
    default = ROOT / "configs" / "ms1mv2_r50.yaml"

    def parse(*words):
        return parse_arguments(list(words), default, "")

    assert parse().data.num_classes == 85742
    config = parse("--network", "iresnet100", "--loss", "CosFace", "--resume", "1")
    assert (config.model.network, config.head.margin.name) == ("iresnet100", "cosface")
    assert config.checkpoint.resume == "latest"
    assert parse("--resume", "0").checkpoint.resume == "never"
    assert parse(str(path), "--resume").checkpoint.resume == "latest"
    config = parse("--resume", str(path), "run.seed=5")  # the flag must not swallow the file
    assert (config.checkpoint.resume, config.optim.lr, config.run.seed) == ("latest", 0.2, 5)
    assert parse(str(path), "--resume", "some/where").checkpoint.resume == "some/where"
    assert parse("--config", str(path), "run.seed=5", "--network", "r18", "run.epochs=3").run.epochs == 3
    with pytest.raises(ConfigError, match="one configuration file"):
        parse(str(path), "other.yaml")


def test_setting_names_are_dotted():
    names = setting_names()
    assert {"run", "run.seed", "head.margin", "head.margin.s", "checkpoint.resume"} <= set(names)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_loads_and_fits(path):
    """Its head says command, expected figure and source; margin, backbone options and schedule accept what it says."""
    from backbones import available_options
    from losses import build_margin
    from utils.data.augment import build_augment
    from utils.model.schedule import LrSchedule

    config = load_config(path)
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any(path.name in line for line in header), "the header names the command"
    build_margin(config.head.margin.name, **config.head.margin.kwargs())
    build_augment(config.data.augment)
    known = available_options(config.model.network)
    assert set(config.model.kwargs()) <= set(known)
    plan = config.schedule
    schedule = LrSchedule(
        plan.name, config.optim.lr, 100, config.run.epochs * 100, round(plan.warmup_epochs * 100), plan.power,
        plan.milestones, plan.gamma, plan.min_lr,
    )  # fmt: skip
    assert 0 < schedule(0) <= config.optim.lr
    assert all(m < config.run.epochs for m in plan.milestones)


@pytest.mark.parametrize(
    "name",
    [
        "ms1mv2_r18",
        "ms1mv2_r200",
        "ms1mv3_r50",
        "glint360k_r100",
        "casia_r50",
        "wf4m_r100",
        "wf12m_r100",
        "wf42m_pfc03_vit_l_64gpus",
        "wf42m_pfc02_mbf_bs8k",
    ],
)
def test_published_recipes_say_what_to_expect_and_from_where(name):
    text = (ROOT / "configs" / f"{name}.yaml").read_text()
    assert "# Expected:" in text and "# Command:" in text and "# Hardware:" in text
    assert any(source in text for source in ("README", "results.txt", "no figure is published"))
