import re
from pathlib import Path

import pytest
import yaml

from potstill import config
from potstill.config import Config, compose, config_hash, differing_keys, from_dict, to_dict
from potstill.errors import Stopped, UserError

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
        ("optimizer=adem", r"optimizer must be one of adam, adamw, .*sgd, got 'adem'"),
        ("experiment=nope", r"experiment must be one of .*, got 'nope'"),
        ("loop.batch_size=1", r"loop\.batch_size must be >= 2"),
        (
            "schedule.warmup_epochs=10",
            r"schedule\.warmup_epochs must be < loop\.epochs \(10\), got 10",
        ),
        ("task=distil", r"teacher\.run must name the folder of a trained run.*add teacher\.run="),
        (
            "task.terms.task.weight=-1",
            r"task\.terms\.task\.weight must be a number >= 0, or a mapping with schedule, got -1",
        ),
        (
            "model._target_=os.system",
            r"model\._target_ must be one of .*ladeda9, timm, tiny_ladeda, got 'os\.system'",
        ),
        ("just-a-word", r"an argument must be key=value, got 'just-a-word'"),
        ("loop.epochs=(3", r"loop\.epochs=\(3 was refused"),
        ("data.classes=[]", r"data\.classes must name at least one class, got \[\]; null takes"),
        ("loop.seed=-1", r"loop\.seed must be >= 0, got -1"),
        ("data.split.seed=-1", r"data\.split\.seed must be >= 0, got -1"),
        (
            "optimizer.betas=[0.9]",
            r"optimizer\.betas must be two or three numbers >= 0 and < 1, got \[0\.9\]",
        ),
        (
            "optimizer.betas=[0.9,1]",
            r"optimizer\.betas must be two or three numbers >= 0 and < 1, got",
        ),
        (
            "optimizer.betas=[-0.1,0.9]",
            r"optimizer\.betas must be two or three numbers >= 0 and < 1, got",
        ),
        ("model=null", r"model must be one of ladeda9, plugin, timm, tiny_ladeda, got 'null'"),
        ("model=5", r"model must be one of ladeda9, plugin, timm, tiny_ladeda, got '5'"),
        ("~model", r"model must be a mapping with _target_, got \{\}; use model=timm"),
        ("model.name=null", r"model\.name must be text, got null; such as"),
        ("model.pretrained=maybe", r"model\.pretrained must be true or false, got 'maybe'"),
        (
            "model.drop_path=1.0",
            r"model\.drop_path must be null or a number >= 0 and < 1, got 1\.0",
        ),
        (
            "model.drop_path=much",
            r"model\.drop_path must be null or a number >= 0 and < 1, got 'much'",
        ),
        ("model.kwargs=5", r"model\.kwargs must be null or a mapping, got 5"),
        (
            "model.freeze=1",
            r"model\.freeze must be .*got 1; use model\.freeze\.all_but_last_blocks=",
        ),
        (
            "model.freeze.all_but_last_blocks=-1",
            r"all_but_last_blocks must be .*integer >= 0, got -1",
        ),
        (
            "model.freeze.all_but_last_blocks=1.5",
            r"all_but_last_blocks must be .*integer >= 0, got 1",
        ),
        ("model.freeze.all_but_last_blocks=true", r"must be null or an integer >= 0, got true"),
        ("task=null", r"task must be one of binary, classify, distil, multilabel, got 'null'"),
        ("~task", r"task must be a mapping of terms, .*got \{\}; use task=classify"),
        (
            "task.terms=5",
            r"task\.terms must be a mapping .*, got 5; use task=classify or task=distil",
        ),
        ("task.terms=null", r"task\.terms must be a mapping .*, got null; use task=classify"),
        (
            "task.terms.task=5",
            r"task\.terms\.task must be a mapping with loss and inputs, got 5; add",
        ),
        (
            "task.terms.more={weight: 1}",
            r"task\.terms\.more must be a mapping with loss and inputs",
        ),
        ("task.terms.task.loss=null", r"task\.terms\.task\.loss must be text, got null"),
        ("task.terms.task.inputs=5", r"task\.terms\.task\.inputs must be a list of names, got 5"),
        ("task.terms.task.inputs=logits", r"inputs must be a list of names, got 'logits'"),
        (
            "task.terms.task.inputs=[logits,3]",
            r"inputs must be a list of names, got \['logits', 3\]",
        ),
        (
            "task.terms.task.weight=true",
            r"task\.terms\.task\.weight must be a number >= 0, or a mapping with schedule, got true",
        ),
        (
            "task.terms.task.label_smoothing=1.5",
            r"label_smoothing must be a number >= 0 and <= 1, got 1\.5",
        ),
        (
            "task.terms.task.label_smoothing=null",
            r"label_smoothing must be a number >= 0 and <= 1, got null",
        ),
        (
            "task.terms.task.temperature=0",
            r"task\.terms\.task\.temperature must be a number > 0, got 0",
        ),
    ],
)
def test_mistakes_are_refused_by_key_rule_value_and_remedy(override, says):
    with pytest.raises(UserError, match=says):
        compose("train", [override])


@pytest.mark.parametrize(
    ("yaml_text", "says"),
    [
        ("model: {init_from: 5}", r"model\.init_from must be null or text, got 5"),
        (
            "model: {freeze: {all_but_last: 2}}",
            r"model\.freeze must be .*got \{.*'all_but_last': 2",
        ),
        ("task: {weight: 2}", r"task must be a mapping of terms, and of nothing else"),
        ("task: {terms: {a.b: {loss: kl, inputs: []}}}", r"task\.terms must be .*no dots in names"),
    ],
)
def test_mistakes_in_a_file_are_refused_too(yaml_text, says, tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{yaml_text}\n")
    with pytest.raises(UserError, match=says):
        compose("train", ["experiment=mine"], str(tmp_path))


@pytest.mark.parametrize("split", ["loop.micro_batch_size=8", "loop.accumulate=2"])
def test_batchnorm_over_workers_needs_whole_updates(split):
    key, _, value = split.partition("=")
    with pytest.raises(
        UserError,
        match=rf"scaling\.sync_batchnorm must be false where {key} is set, got true and {value}",
    ):
        compose("train", ["scaling.sync_batchnorm=true", split])
    assert compose("train", ["scaling.sync_batchnorm=true"]).scaling.sync_batchnorm


ODD = [
    "a (b), c=d#e'f [g]",
    "{x: 1",
    '"half',
    "it's",
    "${oc.env:HOME}/x",
    "C:\\d\\",
    r"\${a}\\'",
    "007",
]


@pytest.mark.parametrize("value", ODD)
def test_plain_text_arrives_as_it_was_written(value, tmp_path):
    elsewhere = {"from_run", "output", "images", "data_dir"}
    for job_name, keys in (
        ("train", sorted(config.LITERAL - {"teacher.weights", *elsewhere})),
        ("train", ["data.root", "teacher.weights"]),  # a file or a run
        ("evaluate", ["from_run", "output", "data.root", "cache.dir"]),
        ("predict", ["from_run", "images"]),
        ("quickstart", ["data_dir"]),
    ):
        # unlabelled images are taken only where something learns from them
        task = ["task=distil", "teacher.model={_target_: timm}"] if job_name == "train" else []
        overrides = [*task, *(f"{key}={value}" for key in keys)]
        composed = dict(config.flatten(to_dict(compose(job_name, overrides))))
        assert {key: composed[key] for key in keys} == dict.fromkeys(keys, value)


def test_what_is_quoted_or_null_keeps_its_meaning():
    composed = compose(
        "train", ["data.root='/a b'", 'cache.dir="c, d"', "run.name=null", "+model.init_from=null"]
    )
    assert (composed.data.root, composed.cache.dir) == ("/a b", "c, d")
    assert (composed.run.name, composed.model["init_from"]) == (None, None)


def test_evaluating_takes_no_decoding():
    assert compose("evaluate", ["data.root=/d", "data.max_samples=9"]).data.max_samples == 9
    for override in ("data.decode.image_px=64", "data.split.val=0.5", "data.shuffle_window_gb=1"):
        with pytest.raises(UserError, match=r"data\.\S+ is not a key of this job"):
            compose("evaluate", [override])
    with pytest.raises(UserError, match=r"did you mean data\.classes"):
        compose("evaluate", ["data.clases=[a]"])


@pytest.mark.parametrize(
    ("raised", "status", "said"),
    [
        (None, 0, ""),
        (UserError("no such thing"), 2, "error: no such thing\n"),
        (Stopped("stopped; saved at step 3"), 130, "stopped; saved at step 3\n"),
        (KeyboardInterrupt(), 130, "stopped; the same command goes on from here\n"),
    ],
)
def test_exit_statuses(raised, status, said, capsys):
    def main(_: object) -> None:
        if raised:
            raise raised

    assert config._run("report", main, []) == status
    assert capsys.readouterr().err == said


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
    from potstill.data.policies import parse_policy
    from potstill.optim import check_optimizer
    from potstill.task import build_terms

    composed = compose("train", [f"experiment={experiment}", "teacher.run=somewhere"])
    assert composed.experiment == experiment
    build_terms(composed.task["terms"], composed.task["kind"])
    check_optimizer(composed.optimizer)
    if composed.augment.policy:
        parse_policy(composed.augment.policy)
    assert build_model(composed, [f"class {k}" for k in range(12)]).num_classes == 12
    head = (config.CONF_DIR / "experiment" / f"{experiment}.yaml").read_text().split("\n\n")[0]
    for word in (r"uv run jobs/", r"[Ee]xpect", r"[Cc]ost"):
        assert re.search(word, head), (
            f"{experiment}.yaml opens with its purpose, command, expectation and cost"
        )


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_debug_shrinks_every_experiment(experiment):
    overrides = [f"experiment={experiment}", "teacher.run=somewhere", "debug=true"]
    small = compose("train", [*overrides, "loop.steps_per_epoch=5000"])
    assert small.loop.epochs <= 2
    assert small.loop.steps_per_epoch == 10
    assert small.augment.image_px <= 64
    assert not small.loop.compile


def test_debug_and_paths_set_in_python_mean_the_same():
    plain = compose("train", ["data.root=x", "loop.epochs=90"])
    plain.debug, plain.data.root = True, "/data/${x}/y"
    checked = config.checked(plain)
    assert (checked.loop.epochs, checked.data.root) == (2, "/data/${x}/y")


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


def test_the_identity_does_not_depend_on_the_current_folder(tmp_path, monkeypatch):
    plain = compose("train", ["data.root=/d"])
    taught = ["data.root=/d", "experiment=realfake_two_stage", "teacher=ladeda9"]
    named, file = compose("train", taught), compose("train", [*taught, "teacher.weights=w"])
    before = [config_hash(c) for c in (plain, named, file)]
    monkeypatch.chdir(tmp_path)
    after = [config_hash(c) for c in (plain, named, file)]
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False, False]


def test_a_folder_of_experiments_can_be_added(tmp_path: Path):
    folder = tmp_path / ODD[0]
    (folder / "experiment").mkdir(parents=True)
    (folder / "experiment" / "best.yaml").write_text("# @package _global_\nloop: {epochs: 77}\n")
    assert compose("train", ["experiment=best"], str(folder)).loop.epochs == 77
    with pytest.raises(UserError, match=r"loop\.epocs is not a key"):
        compose("train", ["experiment=best", "loop.epocs=3"], str(folder))
    with pytest.raises(UserError, match="--config-dir must be a folder"):
        compose("train", [], str(tmp_path / "nowhere"))


@pytest.mark.parametrize("name", sorted(config.SCHEMAS))
def test_help_names_every_key_and_says_what_it_means(name):
    listed = {key: text for key, _, text in config._documented(config.SCHEMAS[name](), name)}
    wanted = {
        re.sub(r"^task\.terms\.\w+", "task.terms.<term>", k) for k in config._known_keys(name)
    }
    open_nodes = ("task.terms.<term>.", "teachers.<name>.")
    options = {key for key in listed.keys() - wanted if key.startswith(open_nodes)}
    assert listed.keys() - options == wanted
    assert [key for key, text in listed.items() if not text] == []
    shown = config._keys_help(name)
    for key, text in listed.items():
        assert re.search(rf"^  {re.escape(key)} .*{re.escape(text)}$", shown, re.MULTILINE), key


def test_help_shows_the_keys_of_model_and_task_with_their_defaults():
    shown = config._keys_help("train")
    for line in (
        r"model\.name +resnet18 +A model of timm",
        r"model\.freeze\.all_but_last_blocks +null +n: only the head",
        r"task\.terms\.<term>\.weight +1\.0 +What",
        r"task\.terms\.<term>\.temperature +\$\{teacher\.temperature\} +kl",
    ):
        assert re.search(rf"^  {line}", shown, re.MULTILINE), line
    assert "decoded as the run's own" in config._keys_help("evaluate")


def test_unlabelled_images_need_a_term_that_learns_from_them():
    with pytest.raises(UserError, match=r"data\.unlabeled needs a term that learns without labels"):
        compose("train", ["data.root=x", "data.unlabeled=y"])
    compose("train", ["data.root=x", "data.unlabeled=y", "task=distil", "teacher.run=t"])


def test_options_of_a_plugins_loss_are_its_own_affair(monkeypatch):
    from potstill import registry

    monkeypatch.setitem(registry._KNOWN["loss"], "mine", lambda logits_BK, label_B, *, alpha: None)
    node = "task.terms.task={loss: mine, inputs: [logits, label], alpha: 5.0}"
    assert compose("train", ["data.root=x", node]).task["terms"]["task"]["alpha"] == 5.0
    with pytest.raises(UserError, match=r"task\.terms\.task\.alpha must be"):
        compose("train", ["data.root=x", node.replace("mine", "focal")])


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ("[{}]", r"stages\.0\.epochs must be an integer >= 1, got None"),
        ("[{epochs: 0}]", r"stages\.0\.epochs must be an integer >= 1, got 0"),
        ("[5]", r"the config was refused: Cannot assign int to Dict"),
        ("[{epochs: 2, termz: {}}]", r"stages\.0\.termz is not a key.*did you mean terms"),
        ("[{epochs: 2, terms: [1]}]", r"stages\.0\.terms must be a mapping"),
        ("[{epochs: 2, terms: {task: 5}}]", r"stages\.0\.terms\.task must be a mapping, or null"),
        ("[{epochs: 2, optimizer: 3}]", r"stages\.0\.optimizer must be a mapping"),
        ("[{epochs: 1}, {epochs: 2, optimizer: {lr: -1}}]", r"stages\.1: optimizer\.lr must be"),
        ("[{epochs: 2, optimizer: {momentun: 1}}]", r"optimizer\.momentun is not.*did you mean"),
        ("[{epochs: 2, augment: {views: 3}}]", r"stages\.0\.augment\.views must not be set"),
        ("[{epochs: 2, terms: {task: null}}]", r"stages\.0: task\.terms must be"),
    ],
)
def test_stages_that_cannot_be(stages, said):
    with pytest.raises(UserError, match=said):
        compose("train", ["data.root=x", f"stages={stages}"])


def test_the_stages_say_how_many_epochs_there_are():
    stages = (
        "stages=[{epochs: 2}, {epochs: 3, optimizer: {lr: 0.1}, freeze: {all_but_last_blocks: 0}}]"
    )
    composed = compose("train", ["data.root=x", stages])
    assert composed.loop.epochs == 5
    first, second = config.stage_configs(composed)
    assert (first.optimizer.lr, second.optimizer.lr, second.loop.epochs) == (1e-3, 0.1, 3)
    assert second.model["freeze"] == {"all_but_last_blocks": 0}
    with pytest.raises(UserError, match=r"loop\.epochs is what the stages make together"):
        compose("train", ["data.root=x", stages, "loop.epochs=9"])


def test_a_student_without_its_teacher_is_told_where_to_get_one():
    with pytest.raises(UserError, match=r"add teacher\.run=runs/<name>, or let jobs/distil\.py"):
        compose("train", ["experiment=realfake", "data.root=x"])
    compose("distil", ["experiment=realfake", "data.root=x"])


@pytest.mark.parametrize(
    "override",
    ["augment.rotate=5", "data.decode.fit=pad", "cache.format=jpeg", "augment.mixup=0.2"],
)
def test_what_would_wipe_out_pixel_traces_is_refused(override):
    with pytest.raises(UserError, match=rf"{override.split('=')[0]} must be .* for model=ladeda9"):
        compose("train", ["experiment=realfake_teacher", "data.root=x", override])
    several = ["teachers.a.weights=w.pth", "teachers.a.model={_target_: ladeda9}", "task=distil"]
    with pytest.raises(UserError, match=r"for teachers\.a\.model=ladeda9"):
        compose("train", ["data.root=x", *several])
