"""Where rows come from: layouts, splits, selections, and what is refused."""

import os
from collections import Counter

import numpy as np
import pytest

from potstill import registry
from potstill.config import Data, Decode, EvaluateData, Split
from potstill.data.sources import UNLABELED, Entry, Listing, fingerprint, list_rows
from potstill.errors import UserError
from potstill.evaluation import _data


def fill(folder, names, content=b"x"):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(content)


def flat(root, classes, each=10):
    for name in classes:
        fill(root / name, [f"{i:03d}.jpg" for i in range(each)])
    return root


def rows_of(root, **keys):
    return list_rows(Data(root=str(root), **keys))


def by_path(rows):
    return {
        p: (rows.classes[c], s) for p, c, s in zip(rows.path, rows.label, rows.split, strict=True)
    }


def refusal(root, **keys):
    with pytest.raises(UserError) as caught:
        rows_of(root, **keys)
    return str(caught.value)


def test_a_made_split_takes_a_share_of_every_class(tmp_path):
    flat(tmp_path, ["a", "b"], 10)
    fill(tmp_path / "rare", ["1.jpg", "2.jpg"])
    fill(tmp_path / "single", ["1.jpg"])
    rows = rows_of(tmp_path)
    counts = Counter(by_path(rows).values())
    assert counts == {
        ("a", "train"): 8,
        ("a", "val"): 2,
        ("b", "train"): 8,
        ("b", "val"): 2,
        ("rare", "train"): 1,
        ("rare", "val"): 1,
        ("single", "train"): 1,
    }
    assert rows.classes == ["a", "b", "rare", "single"]
    assert rows.size.tolist() == [1] * 23


def test_selecting_classes_keeps_the_split(tmp_path):
    flat(tmp_path, ["Quercus_alba", "Quercus_nigra", "Acer_rubrum"], 20)
    everything = by_path(rows_of(tmp_path))
    oaks = by_path(rows_of(tmp_path, classes=["Quercus_*"]))
    assert len(oaks) == 40
    assert all(everything[path] == row for path, row in oaks.items())
    other_seed = by_path(rows_of(tmp_path, split=Split(seed=1)))
    assert other_seed != everything


def test_the_split_does_not_depend_on_where_the_root_is_or_on_a_train_folder(tmp_path):
    flat(tmp_path / "one", ["a", "b"])
    flat(tmp_path / "two" / "train", ["a", "b"])
    one = by_path(rows_of(tmp_path / "one"))
    two = by_path(rows_of(tmp_path / "two"))
    assert {f"train/{path}": row for path, row in one.items()} == two


@pytest.mark.parametrize(
    "names",
    [("train", "val", "test"), ("Training", "validation", "testing"), ("train", "valid", "test")],
)
def test_split_folders_and_their_aliases(tmp_path, names):
    for folder, each in zip(names, (6, 3, 2), strict=True):
        flat(tmp_path / folder, ["a", "b"], each)
    rows = rows_of(tmp_path)
    assert Counter(rows.split.tolist()) == {"train": 12, "val": 6, "test": 4}
    assert rows.classes == ["a", "b"]


def test_classes_are_the_union_over_the_splits(tmp_path):
    flat(tmp_path / "train", ["b", "c"])
    flat(tmp_path / "val", ["a", "b"], 3)
    rows = rows_of(tmp_path)
    assert rows.classes == ["a", "b", "c"]
    assert by_path(rows)["val/a/000.jpg"] == ("a", "val")


def test_test_stays_test_where_val_is_made(tmp_path):
    flat(tmp_path / "train", ["a", "b"], 10)
    flat(tmp_path / "test", ["a", "b"], 5)
    assert Counter(rows_of(tmp_path).split.tolist()) == {"train": 16, "val": 4, "test": 10}


def test_a_class_may_be_called_train(tmp_path):
    flat(tmp_path, ["car", "train"], 5)
    assert rows_of(tmp_path).classes == ["car", "train"]


def test_what_is_a_candidate_and_what_is_not(tmp_path):
    flat(tmp_path, ["a", "b"], 4)
    fill(tmp_path / "a", [".hidden.jpg", "Thumbs.db", "notes.TXT", "labels.csv", "odd.xyz", "none"])
    fill(tmp_path / "a" / "deep" / "er", ["1.png"])
    fill(tmp_path / "a" / ".thumbnails", ["1.jpg"])
    fill(tmp_path / ".cache" / "c", ["1.jpg"])
    fill(tmp_path, ["README.md", "loose.jpg"])
    (tmp_path / "b" / "broken.jpg").symlink_to(tmp_path / "nowhere")
    (tmp_path / "b" / "loop").symlink_to(tmp_path / "b")
    os.mkfifo(tmp_path / "b" / "pipe.jpg")
    rows = rows_of(tmp_path)
    paths = set(rows.path)
    assert len(paths) == 8 + 4
    assert {"a/odd.xyz", "a/none", "a/deep/er/1.png", "b/broken.jpg"} <= paths
    assert rows.ignored == {
        ".db": 1,
        ".txt": 1,
        ".csv": 1,
        ".md": 1,
        "(in no class folder)": 1,
        "(no regular file)": 1,
    }


def test_names_that_are_not_utf8_or_differ_in_composition(tmp_path):
    flat(tmp_path / "train", ["Cafe\u0301", "b"], 3)
    flat(tmp_path / "val", ["Caf\u00e9", "b"], 3)
    odd = os.fsencode(tmp_path / "train" / "b") + b"/\xff.jpg"
    with open(odd, "wb") as file:
        file.write(b"x")
    rows = rows_of(tmp_path)
    assert rows.classes == ["Caf\u00e9", "b"]
    assert len(rows) == 13
    fingerprint(rows, Decode())


def test_ids_are_hashes_of_the_paths(tmp_path):
    flat(tmp_path, ["a", "b"], 50)
    rows = rows_of(tmp_path)
    assert rows.id.dtype == np.int64
    assert (rows.id >= 0).all()
    assert len(set(rows.id.tolist())) == 100
    (tmp_path / "a" / "000.jpg").unlink()
    fewer = rows_of(tmp_path)
    assert (
        dict(zip(fewer.path, fewer.id, strict=True)).items()
        <= dict(zip(rows.path, rows.id, strict=True)).items()
    )


# --------------------------------------------------------------------------------------- max_samples
def test_max_samples_keeps_proportions_and_classes(tmp_path):
    flat(tmp_path, list("abcdefgh"), 20)
    fill(tmp_path / "rare", ["1.jpg", "2.jpg"])
    everything = by_path(rows_of(tmp_path))
    rows = rows_of(tmp_path, max_samples=60)
    assert len(rows) == 60
    counts = Counter(rows.split.tolist())
    assert counts["val"] == 12
    assert {c for c, s in by_path(rows).values() if s == "train"} == {*"abcdefgh", "rare"}
    assert all(everything[path] == row for path, row in by_path(rows).items())
    assert by_path(rows) == by_path(rows_of(tmp_path, max_samples=60))
    assert len(rows_of(tmp_path, max_samples=10_000)) == 162


@pytest.mark.parametrize("wanted", [6, 7, 9, 30])
def test_max_samples_leaves_every_split_two_images(tmp_path, wanted):
    flat(tmp_path / "train", ["a", "b"], 3)
    flat(tmp_path / "val", ["a", "b"], 40)
    flat(tmp_path / "test", ["a", "b"], 40)
    counts = Counter(rows_of(tmp_path, max_samples=wanted).split.tolist())
    assert sum(counts.values()) == wanted
    assert min(counts[s] for s in ("train", "val", "test")) >= 2


# --------------------------------------------------------------------------------------- fingerprint
def test_the_key_follows_the_source_and_not_its_place(tmp_path):
    root = flat(tmp_path / "one", ["a", "b"], 5)
    for path in root.rglob("*.jpg"):
        os.utime(path, ns=(10**18, 10**18))
    key = fingerprint(rows_of(root), Decode())
    root = root.rename(tmp_path / "two")
    assert fingerprint(rows_of(root), Decode()) == key
    changes = {
        fingerprint(rows_of(root), Decode(image_px=64)),
        fingerprint(rows_of(root), Decode(fit="pad")),
    }
    os.utime(root / "a" / "000.jpg", ns=(10**18, 10**18 + 1))
    changes.add(fingerprint(rows_of(root), Decode()))
    os.utime(root / "a" / "000.jpg", ns=(10**18, 10**18))
    assert fingerprint(rows_of(root), Decode()) == key
    (root / "b" / "000.jpg").rename(root / "b" / "zzz.jpg")
    changes.add(fingerprint(rows_of(root), Decode()))
    (root / "b" / "zzz.jpg").unlink()
    changes.add(fingerprint(rows_of(root), Decode()))
    assert len(changes - {key}) == 5


# ------------------------------------------------------------------------------------------ refusals
def test_refusals_name_key_value_and_remedy(tmp_path):
    (tmp_path / "empty").mkdir()
    flat(tmp_path / "seedlings", ["a", "b"])
    fill(tmp_path / "loose", ["1.jpg", "2.jpg"])
    fill(tmp_path / "one" / "only", ["1.jpg", "2.jpg"])
    flat(tmp_path / "outer" / "inner", ["a", "b"])
    fill(tmp_path / "singles" / "a", ["1.jpg"])
    fill(tmp_path / "singles" / "b", ["1.jpg"])
    flat(tmp_path / "notrain" / "val", ["a", "b"])
    flat(tmp_path / "notrain" / "test", ["a", "b"])
    flat(tmp_path / "twice" / "val", ["a", "b"])
    flat(tmp_path / "twice" / "validation", ["a", "b"])
    flat(tmp_path / "twice" / "train", ["a", "b"])
    expected = {
        "empty": ("data.root must be a folder of class folders", "holds nothing", "root/<class>/"),
        "seedling": ("data.root", "does not exist", "did you mean", "seedlings"),
        "loose/1.jpg": ("data.root", "is a file"),
        "loose": ("data.root", "2 files", "root/<class>/"),
        "one": ("at least 2 classes", "got 1 (only)"),
        "outer": ("at least 2 classes", "got 1 (inner)", "did you mean data.root=", "outer/inner"),
        "singles": ("validation images", "add images"),
        "notrain": ("training images", "got 0", "train/"),
        "twice": ("one val folder", "val and validation", "merge"),
    }
    for name, parts in expected.items():
        message = refusal(tmp_path / name)
        assert all(part in message for part in parts), message
    with pytest.raises(UserError, match=r"data\.root .* got null"):
        list_rows(Data())


def test_refused_selections(tmp_path):
    flat(tmp_path, ["Quercus_alba", "Quercus_nigra", "Acer_rubrum"])
    message = refusal(tmp_path, classes=["Querkus_*"])
    assert "'Querkus_*' matches none of the 3 classes" in message
    assert "Quercus_alba" in message
    assert "data.classes" in refusal(tmp_path, classes=["Acer_*"])
    assert "data.max_samples must be >= 4" in refusal(tmp_path, max_samples=3)
    for share in (0.0, 1.0, -0.1, 1.5):
        assert "data.split.val must be > 0 and < 1" in refusal(tmp_path, split=Split(val=share))


# ---------------------------------------------------------------------------------------- unlabelled
def test_unlabelled_images_are_for_training(tmp_path):
    flat(tmp_path / "labelled", ["a", "b"], 10)
    names = [f"{i:02d}.jpg" for i in range(20)]
    fill(tmp_path / "more" / "deep", [*names, "notes.txt"], b"more")
    keys = {"unlabeled": str(tmp_path / "more")}
    rows, alone = rows_of(tmp_path / "labelled", **keys), rows_of(tmp_path / "labelled")
    more = [i for i, label in enumerate(rows.label) if label == UNLABELED]
    assert [rows.path[i] for i in more] == [f"unlabeled/deep/{name}" for name in names]
    assert set(rows.split[more]) == {"train"}
    assert set(rows.weight[more]) == {1.0}
    assert rows.open().read(more[0]) == b"more"
    assert rows.open().read(0) == b"x"
    assert rows.ignored == {".txt": 1}
    # what is labelled stays as it is without them
    assert {p: r for p, r in by_path(rows).items() if p[0] != "u"} == by_path(alone)
    assert fingerprint(rows, Decode()) != fingerprint(alone, Decode())
    some = rows_of(tmp_path / "labelled", max_samples=20, **keys)
    assert Counter(some.label.tolist()) == {0: 5, 1: 5, -1: 10}
    assert len(rows_of(tmp_path / "labelled", classes=["a", "b"], **keys)) == 40


def test_an_unlabelled_folder_below_the_root_is_no_class(tmp_path):
    flat(tmp_path, ["a", "b", "rest"], 4)
    rows = rows_of(tmp_path, unlabeled=str(tmp_path / "rest"))
    assert rows.classes == ["a", "b"]
    assert len(rows) == 12
    assert "must be a folder of images" in refusal(tmp_path, unlabeled=str(tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    assert "which holds none" in refusal(tmp_path, unlabeled=str(tmp_path / "empty"))


def test_a_run_may_be_evaluated_on_another_kind_of_source():
    own = Data(root="photos", source="manifest", unlabeled="more")
    asked = _data(EvaluateData(root="photos.tar", source="tar"), own)
    assert (asked.source, asked.root, asked.unlabeled) == ("tar", "photos.tar", None)
    assert _data(EvaluateData(root="others.csv"), own).source == "manifest"
    assert _data(EvaluateData(), own) == own


# ------------------------------------------------------------------------------------------ plug-ins
@pytest.fixture
def plugged(monkeypatch):
    """Registers a source for one test."""

    def plug(listing):
        monkeypatch.setitem(registry._KNOWN["source"], "mine", lambda data: listing)
        return Data(source="mine")

    return plug


def test_what_a_plug_in_lists_is_checked(plugged):
    def entries(*labels, **more):
        return [Entry(f"{i}.jpg", label, **more) for i, label in enumerate(labels)]

    good = plugged(Listing(entries(*[("a",), ("b",)] * 5), None, "mine"))
    assert Counter(list_rows(good).split.tolist()) == {"train": 8, "val": 2}
    for labels, expected in (
        ([("a",), ("b",), ("a", "b")], "data.multi_label must be true"),
        ([("a",), ("b",), ()], "got false and none for '2.jpg'"),
    ):
        with pytest.raises(UserError, match=expected):
            list_rows(plugged(Listing(entries(*labels), None, "mine")))
    zero = entries(*[("a",), ("b",)] * 5, weight=0.0)
    with pytest.raises(UserError, match=r"data\.columns\.weight must be above 0"):
        list_rows(plugged(Listing(zero, None, "mine")))
    split = entries(("a",), ("b",), ("a",), group="g")
    split[0].split, split[2].split = "train", "val"
    with pytest.raises(UserError, match=r"'g' must be in one split, got '0\.jpg' in train"):
        list_rows(plugged(Listing(split, None, "mine")))
    with pytest.raises(
        UserError, match=r"data\.source must be one of digits, folder, .*tar, got 'tarr'; did"
    ):
        list_rows(Data(source="tarr"))


def test_a_folder_to_evaluate_on_may_be_less(tmp_path):
    flat(tmp_path / "test", ["a"], 4)
    assert Counter(list_rows(Data(root=str(tmp_path)), for_training=False).split.tolist()) == {
        "test": 4
    }
    flat(tmp_path / "classes", ["a", "b"], 4)
    whole = Data(root=str(tmp_path / "classes"), split=Split(val=1.0))
    assert Counter(list_rows(whole, for_training=False).split.tolist()) == {"val": 8}
