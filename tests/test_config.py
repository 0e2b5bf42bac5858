import re
from pathlib import Path

import pytest
import yaml

from potstill import config
from potstill.config import Config, compose, config_hash, differing_keys, from_dict, to_dict
from potstill.errors import UserError

EXPERIMENTS = sorted(p.stem for p in (config.CONF_DIR / "experiment").glob("*.yaml"))


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("loop.epocs=3", r"loop\.epocs is not a key of this job.*did you mean loop\.epochs"),
        ("model.nmae=resnet18", r"model\.nmae is not a key.*did you mean model\.name"),
        ("loop.epochs=0", r"loop\.epochs must be >= 1, got 0"),
        ("loop.epochs=abc", r"loop\.epochs=abc was refused: .*'abc'.*[Ii]nteger"),
        (
            "loop.patience=0",
            r"loop\.patience must be >= 1, got 0; null switches early stopping off",
        ),
        ("loop.precision=fp8", r"loop\.precision must be one of fp32, bf16, fp16, got 'fp8'"),
        ("optimizer.lr=-1", r"optimizer\.lr must be > 0, got -1"),
        (
            "augment.crop_scale=[0.9,0.2]",
            r"augment\.crop_scale must be two numbers, the smaller first",
        ),
        ("optimizer=adem", r"optimizer must be one of adam, adamw, sgd, got 'adem'"),
        ("experiment=nope", r"experiment must be one of .*, got 'nope'"),
        ("loop.batch_size=1", r"loop\.batch_size must be >= 2"),
        (
            "schedule.warmup_epochs=10",
            r"schedule\.warmup_epochs must be < loop\.epochs \(10\), got 10",
        ),
        ("task=distil", r"teacher\.run must name the folder of a trained run.*add teacher\.run="),
        ("task.terms.task.weight=-1", r"task\.terms\.task\.weight must be a number >= 0, got -1"),
        ("model._target_=os.system", r"model\._target_ must be one of timm, got 'os\.system'"),
        ("just-a-word", r"an argument must be key=value, got 'just-a-word'"),
    ],
)
def test_mistakes_are_refused_by_key_rule_value_and_remedy(override, says):
    with pytest.raises(UserError, match=says):
        compose("train", [override])


def test_accumulating_is_said_once():
    with pytest.raises(UserError, match=r"say the same thing"):
        compose("train", ["loop.micro_batch_size=8", "loop.accumulate=2"])


def test_keys_of_a_model_are_checked_when_it_is_built():
    with pytest.raises(
        UserError, match=r"model\.naem is not a key of timm.*did you mean model\.name\?"
    ):
        config.build("model", {"_target_": "timm", "naem": "x"}, num_classes=3)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_composes_and_builds(experiment, tmp_path):
    from potstill.assemble import build_model
    from potstill.task import build_terms

    composed = compose("train", [f"experiment={experiment}", "teacher.run=somewhere"])
    assert composed.experiment == experiment
    build_terms(composed.task["terms"])
    assert build_model(composed, 12).num_classes == 12
    head = (config.CONF_DIR / "experiment" / f"{experiment}.yaml").read_text().split("\n\n")[0]
    for word in (r"uv run jobs/", r"[Ee]xpect", r"[Cc]ost"):
        assert re.search(word, head), (
            f"{experiment}.yaml opens with its purpose, command, expectation and cost"
        )


def test_debug_shrinks_any_experiment():
    small = compose(
        "train", ["debug=true", "loop.epochs=90", "loop.batch_size=512", "data.max_samples=90000"]
    )
    assert (small.loop.epochs, small.loop.batch_size, small.data.max_samples) == (2, 16, 200)


def test_a_config_survives_its_file(tmp_path: Path):
    composed = compose(
        "train", ["task=distil", "teacher.run=t", "model.kwargs={channels:[4,4,8,8]}"]
    )
    again = from_dict(Config, yaml.safe_load(config.to_yaml(composed)))
    assert to_dict(again) == to_dict(composed)
    assert again.task["terms"]["distil"]["temperature"] == composed.teacher.temperature


def test_identity_is_what_the_result_depends_on():
    base = compose("train", ["data.root=/d"])
    for same in (
        "runs.dir=/x",
        "cache.dir=/y",
        "tracking=none",
        "scaling.num_workers=2",
        "run.tags=[a]",
    ):
        assert config_hash(compose("train", ["data.root=/d", same])) == config_hash(base), same
    other = compose("train", ["data.root=/d", "loop.seed=1", "optimizer.lr=0.5"])
    assert differing_keys(base, other) == ["loop.seed: 0 -> 1", "optimizer.lr: 0.001 -> 0.5"]


def test_a_folder_of_experiments_can_be_added(tmp_path: Path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "best.yaml").write_text("# @package _global_\nloop: {epochs: 77}\n")
    assert compose("train", ["experiment=best"], str(tmp_path)).loop.epochs == 77
    with pytest.raises(UserError, match="--config-dir must be a folder"):
        compose("train", [], str(tmp_path / "nowhere"))


def test_help_names_every_key():
    text = config._keys_help("train")
    for key, _ in config.flatten(to_dict(Config())):
        assert key in text
    assert "null switches" in text or "null is off" in text
