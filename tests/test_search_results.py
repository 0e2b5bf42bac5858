"""Who won a search, what made the difference, and the files that say so."""

from __future__ import annotations

import csv
import itertools
import json
import math
import random
import subprocess
import sys
import time
from html.parser import HTMLParser

import pytest
from PIL import Image

from potstill.search_results import (
    Objective,
    TrialResult,
    _cell,
    _importance_of,
    _log_ticks,
    best_of,
    eligible,
    figures,
    pareto,
    ranked,
    short_names,
    write_leaderboard,
    write_pictures,
)

ACC = Objective("val_top1_acc", True)
SIZE = Objective("parameters", False)
LATENCY = Objective("latency_ms", False)
AUC = Objective("val_auc", True)
LOSS = Objective("val_loss", False)
FILES = ("leaderboard.csv", "figures.json", "pareto.png", "pareto.html", "plots/importance.png", "plots/parallel.png")  # fmt: skip


def trial(number: int, state: str = "completed", point=None, why="", feasible=True, **values):
    name = f"trial-{number:04d}"
    return TrialResult(number, name, state, point or {}, values, 3, 12.5, why, feasible)


def random_trials(rng: random.Random, objectives, count: int) -> list[TrialResult]:
    """Few different values, so that ties abound; some without a value, some not eligible."""
    return [
        trial(
            number,
            rng.choice(["completed", "completed", "stopped early", "failed", "running"]),
            feasible=rng.random() < 0.9,
            **{o.name: rng.choice([1, 2, 3, 4.5, 6, math.nan, None, 7, 8]) for o in objectives},
        )
        for number in rng.sample(range(100), count)
    ]


def searched(count: int, seed: int = 0) -> list[TrialResult]:
    """A search as it may have gone: every kind of variable, every state."""
    rng, trials = random.Random(seed), []
    for number in range(count):
        loss = rng.choice([{"name": "none"}, {"name": "kd", "alpha": 0.5}])
        point = {
            "model.name": rng.choice(["resnet18", "convnext_atto", "mobilenetv3_small_100"]),
            "optimizer.lr": 10 ** rng.uniform(-5, -1),
            "loop.batch_size": rng.choice([32, 64, 128]),
            "loop.clip_norm": rng.choice([None, 0.5, 1.0]),
            "loop.ema": rng.random() < 0.5,
            "augment.crop_scale": [rng.choice([0.1, 0.3]), 1.0],
            "task.terms": loss,
        }
        if loss["name"] == "kd":
            point["task.terms.kd.temperature"] = rng.uniform(1, 8)
        size = rng.choice([200_000, 900_000, 5_000_000])
        accuracy = 90 - 6 * abs(math.log10(point["optimizer.lr"]) + 3) + rng.gauss(0, 0.5)
        values = {"val_top1_acc": accuracy, "val_loss": 100 / accuracy, "parameters": size}
        values |= {"latency_ms": size / 1e6 + rng.random(), "latency_ms_batch": size / 1e5}
        state = rng.choices(["completed", "stopped early", "failed"], [0.6, 0.3, 0.1])[0]
        if state == "failed":
            values = {"val_top1_acc": None}
        trials.append(trial(number, state, point, "out of memory" * (state == "failed"), **values))
    return trials


# ------------------------------------------------------------------------------------------- selection
def dominates(a: TrialResult, b: TrialResult, objectives) -> bool:
    pairs = [(a.values[o.name], b.values[o.name], o.higher_is_better) for o in objectives]
    return all(x >= y if up else x <= y for x, y, up in pairs) and any(x != y for x, y, _ in pairs)


@pytest.mark.parametrize(
    "objectives",
    [(ACC,), (LOSS,), (ACC, SIZE), (SIZE, ACC), (ACC, AUC), (ACC, SIZE, LATENCY), (LOSS, AUC, SIZE)],
    ids=lambda os: "-".join(o.name for o in os),
)  # fmt: skip
def test_pareto_and_ranks_against_brute_force(objectives):
    rng = random.Random(1)
    first = objectives[0]
    for _ in range(150):
        trials = random_trials(rng, objectives, rng.randint(0, 25))
        scored = [
            t
            for t in trials
            if t.state in ("completed", "stopped early")
            and t.feasible
            and all(isinstance(v, int | float) and math.isfinite(v) for v in t.values.values())
        ]
        expected = {
            t.number
            for t in scored
            if not any(dominates(o, t, objectives) for o in scored)
            and not any(o.values == t.values and o.number < t.number for o in scored)
        }
        front = pareto(trials, objectives)
        assert {t.number for t in front} == expected
        assert len(front) == len(expected)
        sign = -1 if first.higher_is_better else 1
        assert [sign * t.values[first.name] for t in front] == sorted(
            sign * t.values[first.name] for t in front
        )

        order = ranked(trials, objectives)
        assert sorted(t.number for t in order) == sorted(t.number for t in trials)
        assert order[: len(front)] == front
        assert best_of(trials, objectives) is (front[0] if front else None)
        assert {t.number for t in order[: len(scored)]} == {t.number for t in scored}
        for a, b in itertools.combinations(order[: len(scored)], 2):
            assert not dominates(b, a, objectives)
        last = [t.number for t in order[len(scored) :]]
        assert last == sorted(last)


def test_fronts_follow_one_another_and_equals_follow_their_front():
    trials = [
        trial(0, val_top1_acc=80, parameters=10),  # beaten by 3
        trial(1, val_top1_acc=90, parameters=30),
        trial(2, val_top1_acc=90, parameters=30),  # equals 1
        trial(3, val_top1_acc=85, parameters=10),
        trial(4, val_top1_acc=79, parameters=20),  # beaten by 0 too
        trial(5, "failed"),
        trial(6, "stopped early", val_top1_acc=70, parameters=5),
        trial(7, val_top1_acc=99, parameters=1, feasible=False),
    ]
    assert [t.number for t in pareto(trials, [ACC, SIZE])] == [1, 3, 6]
    assert [t.number for t in ranked(trials, [ACC, SIZE])] == [1, 3, 6, 2, 0, 4, 5, 7]
    assert [t.number for t in ranked(trials, [ACC])] == [1, 2, 3, 0, 4, 6, 5, 7]
    assert [t.number for t in pareto(trials, [ACC])] == [1]
    assert [t.number for t in eligible(trials)] == [0, 1, 2, 3, 4, 6]
    assert best_of(trials, [SIZE]).number == 6
    assert best_of(trials[5:6], [ACC]) is None


def test_short_names():
    names = ["optimizer.lr", "a.b.c.temperature", "x.b.c.temperature", "seed", "c.temperature"]
    assert short_names(names) == {
        "optimizer.lr": "optimizer.lr",
        "a.b.c.temperature": "a.b.c.temperature",
        "x.b.c.temperature": "x.b.c.temperature",
        "seed": "seed",
        "c.temperature": "c.temperature",
    }
    assert short_names(["model.student.width"]) == {"model.student.width": "student.width"}
    assert short_names(["a.b.lr", "c.b.lr", "c.d.lr"])["c.d.lr"] == "d.lr"


def test_ticks_of_a_logarithm_are_round():
    assert _log_ticks(15e4, 4e6) == [2e5, 5e5, 1e6, 2e6]
    assert _log_ticks(1e-5, 1e-1) == [1e-5, 1e-4, 1e-3, 1e-2, 1e-1]
    assert len(_log_ticks(1e-30, 1e10)) <= 8


# ---------------------------------------------------------------------------------------------- files
def read(path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


NASTY = [
    "a,b", 'say "yes"', "two\nlines", "cr\r\nlf", " space ", "null", "1", "true", "", "<script>", "äöü",
    1, -2, 0.1 + 0.2, 1e-30, True, None, {"k": [1, "x,y"], "n": None}, [], {}, "{not json",
]  # fmt: skip


def test_the_table_gives_back_what_went_in(tmp_path):
    trials = [
        trial(i, point={"a.b": value, "name": "x"}, val_top1_acc=90 - i / 3, parameters=10**i)
        for i, value in enumerate(NASTY)
    ]
    trials.append(trial(98, "failed", why='died:\n"out, of" memory', val_top1_acc=math.nan))
    trials.append(trial(99, feasible=False, val_top1_acc=99.9, parameters=None, latency_ms=1.5))
    write_leaderboard(tmp_path, trials, [ACC, SIZE])
    write_pictures(tmp_path, trials, [ACC, SIZE], "t")
    rows = read(tmp_path / "leaderboard.csv")
    assert list(rows[0]) == [
        "rank", "name", "state", "pareto", "feasible", "val_top1_acc", "parameters", "latency_ms", "epochs",
        "seconds", "a.b", "name (setting)", "why",
    ]  # fmt: skip
    assert [row["name"] for row in rows] == [t.name for t in ranked(trials, [ACC, SIZE])]
    by_name = {t.name: t for t in trials}

    def setting(cell: str):
        try:
            return json.loads(cell)
        except ValueError:
            return cell

    front = {t.name for t in pareto(trials, [ACC, SIZE])}
    for at, row in enumerate(rows, 1):
        of = by_name[row["name"]]
        assert row["rank"] == (str(at) if at <= len(NASTY) else "")
        assert row["pareto"] == ("yes" if of.name in front else "no")
        assert (row["state"], row["why"]) == (of.state, of.why)
        assert row["feasible"] == ("yes" if of.feasible else "no")
        assert (int(row["epochs"]), float(row["seconds"])) == (of.epochs, of.seconds)
        for key in ("val_top1_acc", "parameters", "latency_ms"):
            value = of.values.get(key)
            assert (float(row[key]) if row[key] else None) == (
                None if value is None or math.isnan(value) else value
            )
        if of.point:
            got = setting(row["a.b"])
            assert (type(got), got) == (type(of.point["a.b"]), of.point["a.b"])
        else:
            assert row["a.b"] == ""
    assert _cell("resnet18") == "resnet18"
    assert _cell({"a": 1, "b": [2]}) == '{"a":1,"b":[2]}'


class Tags(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.title = self.figures = ""
        self._in = ("", None)
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._in = (tag, dict(attrs).get("id"))

    def handle_endtag(self, tag):
        self._in = ("", None)

    def handle_data(self, data):
        if self._in == ("title", None):
            self.title += data
        elif self._in == ("script", "figures"):
            self.figures += data


def test_the_page_needs_no_network_and_believes_no_name(tmp_path):
    evil = '</script></title><script>alert("x")</script><img src=x onerror=alert(1)> & $\\frac{$'
    trials = searched(12)
    for t in trials:
        t.name = f"{evil} {t.number}"
        t.point[f"model.{evil}"] = t.point["model.name"]
        t.point["model.name"] = f"{evil}{t.point['model.name']}"
    write_pictures(tmp_path, trials, [ACC, SIZE], evil)
    page = (tmp_path / "pareto.html").read_text()
    found = Tags(page)
    assert found.title == evil
    assert not [t for t in found.tags if t[0] in ("img", "link", "iframe", "a", "base", "object")]
    assert not any("src" in attrs or "href" in attrs for _, attrs in found.tags)
    assert sum(tag == "script" for tag, _ in found.tags) == 3
    assert "alert(1)" in found.figures
    drawn = json.loads(found.figures)
    assert drawn == json.loads((tmp_path / "figures.json").read_text())
    # plotly reads HTML in texts, though not in the ticks of parallel coordinates
    for dimension in drawn["parallel"]["data"][0]["dimensions"]:
        assert "<" not in dimension["label"].replace("<br>", "")
        dimension.pop("ticktext")
    for harmless in ("b", "/b", "i", "/i", "br", "extra", "/extra", "/span"):
        found.figures = json.dumps(drawn).replace(f"<{harmless}>", "")
        drawn = json.loads(found.figures)
    assert "<" not in found.figures.replace('<span style=\\"font-size', "")
    hover = drawn["pareto"]["data"][1]["hovertext"][0]
    assert "&lt;/script&gt;" in hover
    assert "optimizer.lr = " in hover
    assert "Top-1 accuracy (validation): " in hover


@pytest.mark.parametrize("objectives", [(ACC, SIZE), (ACC, LATENCY, SIZE), (LOSS,)])
def test_what_is_drawn(tmp_path, objectives):
    trials = searched(40)
    write_leaderboard(tmp_path, trials, objectives)
    write_pictures(tmp_path, trials, objectives, "a search")
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()) == sorted(FILES)  # fmt: skip
    for name in FILES:
        if name.endswith("png"):
            with Image.open(tmp_path / name) as image:
                assert image.width > 1000
                assert len(image.convert("RGB").getcolors(1 << 24)) > 60
    drawn = json.loads((tmp_path / "figures.json").read_text())
    assert drawn == json.loads(json.dumps(figures(trials, objectives, "a search")))
    plotly = pytest.importorskip("plotly.graph_objects")
    for figure in drawn.values():
        plotly.Figure(figure)  # raises where plotly knows no such thing
    numbers = [
        int(n) for t in drawn["pareto"]["data"] if t.get("mode") == "markers+text" for n in t["text"]
    ]  # fmt: skip
    front = [t.number for t in pareto(trials, objectives)]
    if len(objectives) > 1:
        assert sorted(numbers) == sorted(front * (len(objectives) - 1))
    else:
        assert numbers.count(front[0]) == 2  # the last best one, and beside it against parameters
    scored = [t for t in trials if t.state != "failed"]
    parallel = drawn["parallel"]["data"][0]
    assert len(parallel["dimensions"]) == 8 + len(objectives)
    for dimension in parallel["dimensions"]:
        assert len(dimension["values"]) == len(scored)
        low, high = dimension["range"]
        assert all(low <= v <= high for v in dimension["values"])
        assert len(dimension["tickvals"]) == len(dimension["ticktext"]) > 0
    labels = {d["label"]: d for d in parallel["dimensions"]}
    assert labels["optimizer.lr"]["values"][0] == pytest.approx(
        math.log10(scored[0].point["optimizer.lr"])
    )
    assert "null" in labels["loop.clip_norm"]["ticktext"]
    assert "not set" in labels["kd.temperature"]["ticktext"]


def test_a_step_line_of_what_a_budget_buys():
    trials = [
        trial(0, val_top1_acc=90, parameters=100_000),
        trial(1, val_top1_acc=80, parameters=1_000),
        trial(2, val_top1_acc=70, parameters=50_000),
    ]
    drawn = figures(trials, [ACC, SIZE], "t")["pareto"]
    line = drawn["data"][0]
    assert (line["x"], line["y"], line["line"]["shape"]) == ([1_000, 100_000], [80, 90], "hv")
    assert drawn["layout"]["xaxis"]["type"] == "log"
    assert drawn["layout"]["yaxis"]["ticksuffix"] == " %"
    for t, auc in zip(trials, (0.5, 0.9, 0.7), strict=True):
        t.values["val_auc"] = auc
    line = figures(trials, [ACC, AUC], "t")["pareto"]["data"][0]  # more is better on both sides
    assert (line["x"], line["y"], line["line"]["shape"]) == ([0.5, 0.9], [90, 80], "vh")
    alone = figures(trials, [ACC], "t")["pareto"]["data"][0]
    assert (alone["x"], alone["y"]) == ([0, 2], [90, 90])


def same(number: int) -> TrialResult:
    return trial(number, point={"optimizer.lr": number + 1}, val_top1_acc=50.0, parameters=7)


CASES = {
    "none": [],
    "one": searched(1),
    "one without settings": [trial(0, val_top1_acc=90, parameters=3)],
    "only failures": [trial(i, "failed", {"a": i}, "died") for i in range(5)],
    "waiting": [trial(0, "running", {"a": 1}), trial(1, "waiting")],
    "no values": [
        trial(i, point={"a": i}, val_top1_acc=math.nan, parameters=None) for i in range(5)
    ],
    "infinite": [trial(i, point={"a": i}, val_top1_acc=math.inf, parameters=1) for i in range(5)],
    "some values": [
        trial(i, point={"a": i}, val_top1_acc=(i, None, math.nan)[i % 3], parameters=i or None)
        for i in range(12)
    ],
    "all equal": [same(i) for i in range(9)],
    "three": searched(3),
    "four": searched(4),
    "same settings": [
        trial(i, point={"a": 1}, val_top1_acc=i, parameters=9 + i) for i in range(6)
    ],
    "zero and negative": [
        trial(i, point={"a": -i, "b": 0}, val_top1_acc=-i, parameters=0) for i in range(6)
    ],
    "many labels": [
        trial(i, point={"a": f"a name that is long and alike {i}" * 3, "b.c": "x" * 300}, val_top1_acc=i, parameters=i)
        for i in range(60)
    ],
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("objectives", [(ACC, SIZE), (ACC,)], ids=len)
def test_every_moment_of_a_search(tmp_path, case, objectives):
    write_leaderboard(tmp_path, CASES[case], objectives)
    write_pictures(tmp_path, CASES[case], objectives, f"{case} " * 30)
    assert len(read(tmp_path / "leaderboard.csv")) == len(CASES[case])
    drawn = figures(CASES[case], objectives, case)
    json.dumps(drawn, allow_nan=False)
    assert set(drawn) == {"pareto", "importance", "parallel"}
    for name in FILES:
        if name.endswith("png"):
            with Image.open(tmp_path / name) as image:
                assert len(image.convert("L").getcolors()) > 10


def test_two_hundred_trials_are_quick(tmp_path):
    trials = searched(200)
    write_pictures(tmp_path, searched(8), [ACC, SIZE], "loads matplotlib and optuna")
    began = time.process_time()
    write_pictures(tmp_path, trials, [ACC, SIZE, LATENCY], "t")
    assert time.process_time() - began < 8  # about 2 on an idle machine


# ------------------------------------------------------------------------------------------ importance
@pytest.mark.parametrize("objective", [ACC, LOSS])
def test_importance_finds_what_matters(objective):
    rng = random.Random(0)
    sign = 1 if objective.higher_is_better else -1
    by_lr, by_model, by_presence = [], [], []
    for i in range(40):
        point = {"optimizer.lr": 10 ** rng.uniform(-5, -1), "optimizer.weight_decay": 10 ** rng.uniform(-5, -1), "model.name": rng.choice("abc"), "loop.seed": i}  # fmt: skip
        if rng.random() < 0.5:
            point["task.kd.temperature"] = rng.uniform(1, 8)
        lr = math.log10(point["optimizer.lr"])
        for trials, value in (
            (by_lr, -abs(lr + 3)),
            (by_model, "abc".index(point["model.name"])),
            (by_presence, "task.kd.temperature" in point),
        ):
            trials.append(trial(i, point=point, **{objective.name: sign * float(value)}))
    for trials, name in (
        (by_lr, "optimizer.lr"),
        (by_model, "model.name"),
        (by_presence, "kd.temperature"),
    ):
        found = _importance_of(trials, [objective])
        assert next(iter(found.shares)) == name
        assert found.shares[name] > 0.6
        assert sum(found.shares.values()) == pytest.approx(1)
    assert _importance_of(by_lr, [objective]) == _importance_of(by_lr, [objective])
    # one that went wild does not decide alone
    wild = [*by_model, trial(99, point={**by_model[0].point, "loop.seed": 0}, **{objective.name: -1e9 * sign})]  # fmt: skip
    assert next(iter(_importance_of(wild, [objective]).shares)) == "model.name"


def test_importance_says_why_there_is_none():
    assert "No trial" in _importance_of([], [ACC]).why_not
    assert _importance_of(searched(2), [ACC]).why_not == "2 trials with a value, 4 needed"
    assert "the same in all 9" in _importance_of([same(i) for i in range(9)], [ACC]).why_not
    assert "same settings" in _importance_of(CASES["same settings"], [ACC]).why_not
    drawn = figures(searched(2), [ACC], "t")["importance"]
    assert drawn["layout"]["annotations"][0]["text"] == "2 trials with a value, 4 needed"


def test_nothing_is_said_and_nothing_is_loaded_before_its_time():
    code = (
        "import sys, potstill.search_results as s\n"
        "assert not {'optuna', 'plotly', 'matplotlib', 'torch', 'ray', 'hydra'} & set(sys.modules)\n"
        "t = [s.TrialResult(i, str(i), 'completed', {'a': i}, {'val_loss': i}, 1, 1.0) for i in range(9)]\n"
        "s.figures(t, [s.Objective('val_loss', False)], 't')\n"
        "import optuna; assert optuna.logging.get_verbosity() == optuna.logging.INFO"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
