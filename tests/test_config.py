"""config.py: YAML, overrides, nearest names, frozenness; every file in configs/ loads and fits its code."""

from pathlib import Path

import pytest

from config import ConfigError, dump_config, fresh, load_config, parse_arguments, setting_names

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
        ("run.epochs=yes", "run.epochs: True: input should not be true or false"),
        ("optim.lr=true", "optim.lr: True: input should not be true or false"),
        ("data.num_classes=true", "data.num_classes: True: input should not be true or false"),
        (
            "run.seed=99999999999999999999",
            "run.seed: 99999999999999999999: input should be less than or equal to 2147483647",
        ),
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


def test_arcface_paddle_flags_and_their_order(tmp_path):
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
    schedule = LrSchedule(base_lr=config.optim.lr, **config.schedule_options(steps_per_epoch=100))
    assert 0 < schedule(0) <= config.optim.lr
    assert all(m < config.run.epochs for m in config.schedule.milestones)


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


def test_one_word_and_commas_where_a_list_is_wanted(tmp_path):
    for text, wanted in (("lfw", ("lfw",)), ("lfw,cfp_fp", ("lfw", "cfp_fp")), ("[lfw, a.bin]", ("lfw", "a.bin"))):
        assert load_config(None, [f"verify.sets={text}"]).verify.sets == wanted
    assert load_config(write(tmp_path, "verify: {sets: lfw}\n")).verify.sets == ("lfw",)
    assert load_config(None, ["init.freeze=conv1"]).init.freeze == ("conv1",)


def test_home_folders_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    names = ("run.output", "data.root", "data.list_file", "verify.root", "checkpoint.resume", "log.plane_beside",
             "init.backbone", "init.head")  # fmt: skip
    config = load_config(None, [f"{name}='~/x y'" for name in names] + ["verify.sets=['~/a.bin', lfw]"])
    for name in names:
        section, key = name.split(".")
        assert config.model_dump()[section][key] == f"{tmp_path}/x y", name
    assert config.verify.sets == (f"{tmp_path}/a.bin", "lfw")
    write(tmp_path, "optim: {lr: 0.3}\n")
    assert load_config("~/c.yaml").optim.lr == 0.3


def test_a_configuration_path_with_an_equals_sign(tmp_path):
    folder = tmp_path / "lr=0.3"
    folder.mkdir()
    path = write(folder, "optim: {lr: 0.3}\n").rename(folder / "optim.lr=0.3.yaml")
    for argv in ([str(path)], [str(path), "--resume"], ["--resume", str(path)]):
        assert parse_arguments([*argv, "run.seed=4"], CONFIGS[0], "").optim.lr == 0.3
    assert parse_arguments(["--resume", str(folder), str(path)], CONFIGS[0], "").checkpoint.resume == str(folder)
    with pytest.raises(ConfigError, match=r"a=b\.yaml: No such file"):
        parse_arguments(["a=b.yaml"], CONFIGS[0], "")
    assert parse_arguments(["data.list_file=b.yaml"], CONFIGS[0], "").data.list_file == "b.yaml"


@pytest.mark.parametrize(
    ("text", "name", "lines"),
    [
        ("optim: {lr: 0.3}\nrun:\n  seed: 1\noptim: {lr: 0.1}\n", "optim", (1, 4)),
        ("run:\n  seed: 1\n  seed: 2\n", "seed", (2, 3)),
    ],
)
def test_a_key_that_stands_twice(tmp_path, text, name, lines):
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    told = str(caught.value)
    assert told.startswith(f"{path}: {name!r} stands twice, in lines {lines[0]} and {lines[1]}") and "\n" not in told


ARC = "head: {margin: {name: arcface, s: 32.0, m: 0.45, easy_margin: true}}\n"


@pytest.mark.parametrize(
    ("loss", "kept"),
    [("CosFace", {"s": 32.0}), ("MagFace", {"s": 32.0}), ("SphereFace", {}), ("softmax", {"s": 32.0}), ("linear", {})],
)
def test_switching_the_margin_drops_the_other_ones_parameters(tmp_path, capsys, loss, kept):
    from losses import build_margin

    path = str(write(tmp_path, ARC))
    for argv in ([path, "--loss", loss], [path, f"head.margin.name={loss}"]):
        margin = parse_arguments(argv, CONFIGS[0], "").head.margin
        assert margin.name == loss.lower() and margin.kwargs() == kept
        build_margin(margin.name, **margin.kwargs())
        told = capsys.readouterr().err
        assert f"{loss.lower()} instead of arcface" in told and "m=0.45, easy_margin=True" in told
        assert told.count("\n") == 1


def test_a_margin_parameter_given_with_the_switch_is_kept_and_checked(tmp_path, capsys):
    from losses import build_margin
    from utils.errors import UserError

    path = str(write(tmp_path, ARC))
    margin = parse_arguments([path, "--loss", "CosFace", "head.margin.m=0.3"], CONFIGS[0], "").head.margin
    assert margin.kwargs() == {"s": 32.0, "m": 0.3}
    margin = parse_arguments([path, "--loss", "MagFace", "head.margin.m=0.3"], CONFIGS[0], "").head.margin
    with pytest.raises(UserError, match=r"margin magface: no parameter 'm' .*l_m, u_m"):
        build_margin(margin.name, **margin.kwargs())
    capsys.readouterr()
    assert parse_arguments([path, "--loss", "ArcFace"], CONFIGS[0], "").head.margin.m == 0.45
    assert capsys.readouterr().err == ""


def test_what_a_run_keeps_does_not_resume_by_itself():
    config = load_config(None, ["checkpoint.resume=latest"])
    assert "resume: never" in dump_config(fresh(config)) and config.checkpoint.resume == "latest"


def test_a_configuration_that_is_refused_is_one_line(tmp_path, capsys):
    (tmp_path / "deep.yaml").write_text("run: " + "[" * 5000 + "]" * 5000)
    with pytest.raises(ConfigError, match=r"deep.yaml: .* nested too deeply"):
        load_config(tmp_path / "deep.yaml")
    (tmp_path / "margin.yaml").write_text("head: {margin: {name: arcface, m: 0.5}}")
    with pytest.raises(ConfigError, match=r"head.margin.name: 5"):
        load_config(tmp_path / "margin.yaml", ["head.margin.name=5"])
    assert capsys.readouterr().err == ""
