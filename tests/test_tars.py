"""Tar shards: samples, labels, splits, patterns, and what is refused."""

import gzip
import io
import json
import os
import pickle
import tarfile

import numpy as np
import pytest

from potstill.config import Columns, Data, Decode
from potstill.data.files import _braces
from potstill.data.sources import fingerprint, list_rows
from potstill.data.tars import _folder_above
from potstill.errors import UserError


def make(path, members):
    """{name: content} as a tar."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            content = content if isinstance(content, bytes) else str(content).encode()
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def rows_of(root, **keys):
    return list_rows(Data(source="tar", root=str(root), **keys))


def refusal(root, **keys):
    with pytest.raises(UserError) as caught:
        rows_of(root, **keys)
    return str(caught.value)


def by_path(rows):
    return {p: (rows.names(i), rows.split[i]) for i, p in enumerate(rows.path)}


def classes(count, ending="cls"):
    members = {}
    for i in range(count):
        members |= {f"{i:04d}.jpg": f"image{i}", f"{i:04d}.{ending}": i % 2}
    return members


def test_a_tarred_tree_is_the_tree(tmp_path):
    paths = [f"{c}/{i}/{i}.png" for c in ("oak", "ash") for i in range(10)]
    for path in paths:
        (tmp_path / "tree" / path).parent.mkdir(parents=True)
        (tmp_path / "tree" / path).write_text(path)
    make(tmp_path / "b.tar", {f"my/photos/{p}": p for p in paths})
    rows = rows_of(make(tmp_path / "a.tar", {f"./{p}": p for p in paths}))
    tree = by_path(list_rows(Data(root=str(tmp_path / "tree"))))
    assert by_path(rows) == by_path(rows_of(tmp_path / "b.tar")) == tree
    reader = pickle.loads(pickle.dumps(rows.part(np.arange(3, 6)))).open()
    assert [reader.read(i) for i in range(3)] == [p.encode() for p in sorted(paths)[3:6]]


def test_a_folder_above_the_classes_is_one_that_all_lie_in(tmp_path):
    assert _folder_above(["a/b/1", "a/c/2"]) == "a/"
    assert _folder_above(["a/b/train/c/1", "a/b/val/c/2"]) == "a/b/"
    assert _folder_above(["train/b/1", "train/c/2"]) == ""
    assert _folder_above(["a/1", "a/2"]) == _folder_above(["a/b/1", "a/2"]) == ""
    assert _folder_above(["a/b/1", "c/b/2"]) == _folder_above([]) == ""


def test_where_a_label_stands(tmp_path):
    members = {
        "1.jpg": "x",
        "1.cls": "oak\n",
        "2.jpg": "x",
        "2.txt": "ash",
        "3.png": "x",
        "3.json": json.dumps({"label": "oak", "split": "test", "weight": 0.5}),
        "sub/4.JPEG": "x",
        "sub/4.cls": "ash",
        "train/5.jpg": "x",
        "train/5.cls": "oak",
        "val/elm/6.x.jpg": "x",
        "val/elm/7.jpg": "x",
        "train/elm/8.jpg": "x",
        "train/9.jpg": "x",
        "9.mask.png": "x",
        ".hidden/1.jpg": "x",
        "readme.md": "x",
    }
    rows = rows_of(make(tmp_path / "a.tar", members))
    assert by_path(rows) == {
        "1.jpg": ("oak", "train"),
        "2.jpg": ("ash", "train"),
        "3.png": ("oak", "test"),
        "sub/4.JPEG": ("ash", "train"),
        "train/5.jpg": ("oak", "train"),
        "val/elm/7.jpg": ("elm", "val"),
        "train/elm/8.jpg": ("elm", "train"),
        "train/9.jpg": ("train", "train"),
    }
    assert rows.weight[rows.path.index("3.png")] == 0.5
    assert rows.ignored == {".jpg": 1, ".md": 1, ".png": 1, "(no image in the sample)": 3}


def test_indices_are_named_by_a_file_beside_the_shards(tmp_path):
    make(tmp_path / "train-0.tar", classes(8))
    assert rows_of(tmp_path).classes == ["0", "1"]
    (tmp_path / "classes.txt").write_text("oak\nash\n")
    assert by_path(rows_of(tmp_path))["0001.jpg"][0] == "ash"
    (tmp_path / "classes.txt").write_text("oak\n")
    message = refusal(tmp_path)
    assert "train-0.tar member '0001', column '.cls': must be an index below 1" in message
    (tmp_path / "classes.txt").unlink()
    (tmp_path / "classes.json").write_text('{"oak": 0}')
    assert "must be a list of class names" in refusal(tmp_path)


def test_patterns_and_splits_of_shards(tmp_path):
    for i in range(3):
        make(tmp_path / f"train-{i:03d}.tar", classes(4))
    make(tmp_path / "validation_0.tar", classes(2))
    make(tmp_path / "trainer.tar", classes(2))
    (tmp_path / "list.txt").write_text("x")
    rows = rows_of(f"{tmp_path}/{{train-{{000..002}},validation_0}}.tar")
    assert set(zip((p[:5] for p in rows.path), rows.split, strict=True)) == {
        ("train", "train"),
        ("valid", "val"),
    }
    # the shards count from 0 each
    assert {"train-000/0000.jpg", "train-002/0003.jpg", "validation_0/0001.jpg"} <= set(rows.path)
    assert [len(rows_of(f"{tmp_path}/{p}")) for p in ("train-*.tar", "train-00[01].tar")] == [12, 8]
    assert len(rows_of(tmp_path)) == 16
    message = refusal(f"{tmp_path}/train-{{000..009}}.tar")
    assert "train-003.tar' and 6 more that it names does not exist" in message
    assert _braces("a{0..2}") == ["a0", "a1", "a2"]
    assert _braces("{a,b}-{08..11}") == [f"{x}-{n}" for x in "ab" for n in ("08", "09", "10", "11")]
    assert "a range must go up" in refusal(f"{tmp_path}/x-{{9..0}}.tar")


def test_two_images_in_a_sample(tmp_path):
    members = {}
    for i in range(6):
        members |= {
            f"{i}.left.jpg": f"L{i}",
            f"{i}.jpg": f"J{i}",
            f"{i}.png": f"P{i}",
            f"{i}.cls": i % 2,
        }
    make(tmp_path / "a.tar", members)
    message = refusal(tmp_path / "a.tar")
    assert "a.tar member '0': must have one image, got .jpg and .png" in message
    assert "data.columns.image=jpg; a.tar member '1'" in message
    for end, letter in (("png", "P"), ("left.jpg", "L")):
        rows = rows_of(tmp_path / "a.tar", columns=Columns(image=end))
        assert rows.open().read(5) == f"{letter}5".encode()


def test_several_labels_in_a_tar(tmp_path):
    members = {}
    for i in range(6):
        labels = ["a", "b"] if i % 2 else ["a"]
        members |= {f"{i}.jpg": "x", f"{i}.json": json.dumps({"labels": labels})}
    path = make(tmp_path / "a.tar", members)
    rows = rows_of(path, multi_label=True)
    assert [rows.names(i) for i in range(4)] == ["a", "a|b", "a", "a|b"]
    assert "member '1', column 'label': must name one class, got 2" in refusal(path)


def test_tars_that_cannot_be_read(tmp_path):
    whole = make(tmp_path / "whole.tar", classes(8)).read_bytes()
    for name, content, expected in (
        ("cut.tar", whole[:1500], "is no whole tar"),
        ("ends.tar", whole[:2048], "has no end"),
        ("two.tar", whole + whole, "more behind its end"),
        ("text.tar", b"This is no tar." * 100, "is no whole tar"),
        ("empty.tar", b"", "is no whole tar"),
    ):
        (tmp_path / name).write_bytes(content)
        message = refusal(tmp_path / name)
        assert expected in message, message
        assert name in message
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(whole))
    assert "without compression" in refusal(tmp_path / "a.tar.gz")
    assert "gunzip a.tar.gz" in refusal(tmp_path / "a.tar.gz")
    make(tmp_path / "none.tar", {"a.txt": "x"})
    assert "must hold images in its tars" in refusal(tmp_path / "none.tar")
    make(tmp_path / "nolabel.tar", {"1.jpg": "x"})
    assert "member '1', column '.cls, .json or .txt': must name a class" in refusal(
        tmp_path / "nolabel.tar"
    )
    with pytest.raises(UserError, match=r"add data\.source=tar"):
        list_rows(Data(root=str(tmp_path / "whole.tar")))


def test_a_shard_that_changed_is_noticed(tmp_path):
    path = make(tmp_path / "a.tar", classes(8))
    rows = rows_of(path)
    key = fingerprint(rows, Decode())
    assert fingerprint(rows_of(path), Decode()) == key
    os.utime(path, ns=(10**18, 10**18))
    with pytest.raises(UserError, match=r"must not change while it is prepared, but .*a\.tar"):
        rows.open().read(0)
    assert fingerprint(rows_of(path), Decode()) != key
