"""The same images from every source, and what stands in object stores: a local server that speaks S3."""

import csv
import json
import os
import pickle
import socket
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import pytest

from conftest import s3_bucket, write_tree
from potstill.config import Data, Decode, config_hash
from potstill.data.files import Place, locate
from potstill.data.sources import fingerprint, list_rows
from potstill.errors import UserError

CLASSES = ("blue", "green", "red", "white")


@pytest.fixture(scope="module")
def s3():
    """An empty S3 on this machine: `s3.uri("colours")`, `s3.put("colours", folder)`."""
    with s3_bucket("pictures") as options:
        filesystem, _ = pyarrow.fs.FileSystem.from_uri(f"s3://pictures?{options}")

        def put(name, content):
            if isinstance(content, Path) and content.is_dir():
                for path in sorted(p for p in content.rglob("*") if p.is_file()):
                    put(f"{name}/{path.relative_to(content).as_posix()}", path.read_bytes())
                return
            content = content.read_bytes() if isinstance(content, Path) else content
            with filesystem.open_output_stream(f"pictures/{name}") as sink:
                sink.write(content)

        yield SimpleNamespace(
            put=put, uri=lambda name: f"s3://pictures/{name}?{options}", options=options
        )


def write_others(tree: Path, folder: Path) -> dict[str, tuple[str, ...]]:
    """The images of a tree in every other form: overrides by name."""
    paths = sorted(p.relative_to(tree).as_posix() for p in tree.rglob("*.png"))
    rows = [{"path": p, "label": p.split("/")[1], "split": p.split("/")[0]} for p in paths]
    with open(tree / "list.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["path", "label", "split"])
        writer.writeheader()
        writer.writerows(rows)
    (tree / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), tree / "list.parquet")
    names = {"info": {"features": {"label": {"_type": "ClassLabel", "names": CLASSES}}}}
    for split in ("train", "val"):
        of_split = [
            {
                "image": {"bytes": (tree / row["path"]).read_bytes(), "path": row["path"]},
                "label": CLASSES.index(row["label"]),
            }
            for row in rows
            if row["split"] == split
        ]
        table = pa.Table.from_pylist(of_split)
        table = table.replace_schema_metadata({"huggingface": json.dumps(names)})
        shard = folder / "hub" / f"{split}-00000-of-00001.parquet"
        shard.parent.mkdir(exist_ok=True)
        pq.write_table(table, shard, row_group_size=5)
    for i in range(2):
        with tarfile.open(folder / f"part-{i}.tar", "w") as archive:
            for path in paths[i::2]:
                archive.add(tree / path, path)
    return {
        "csv": ("data=manifest", f"data.root={tree / 'list.csv'}"),
        "jsonl": ("data=manifest", f"data.root={tree / 'list.jsonl'}"),
        "parquet manifest": ("data=manifest", f"data.root={tree / 'list.parquet'}"),
        "parquet": ("data=parquet", f"data.root={folder / 'hub'}"),
        "tar": ("data=tar", f"data.root={folder}/part-{{0..1}}.tar"),
    }


def test_every_source_gives_the_same_cache_and_the_same_losses(tiny, tmp_path, s3):
    from potstill.data.prepare import prepare
    from potstill.fit import fit

    tree = write_tree(tmp_path / "colours")
    sources = {"folder": (f"data.root={tree}",), **write_others(tree, tmp_path)}
    s3.put("colours", tree)
    for i in range(2):
        s3.put(f"shards/part-{i}.tar", tmp_path / f"part-{i}.tar")
    s3.put("hub", tmp_path / "hub")
    sources["folder, s3"] = (f"data.root={s3.uri('colours')}",)
    sources["csv, s3"] = ("data=manifest", f"data.root={s3.uri('colours/list.csv')}")
    sources["tar, s3"] = ("data=tar", f"data.root={s3.uri('shards/part-{0..1}.tar')}")
    sources["parquet, s3"] = ("data=parquet", f"data.root={s3.uri('hub')}")
    sources["folder, file://"] = (f"data.root={tree.as_uri()}",)
    shards, losses = {}, {}
    for i, (name, overrides) in enumerate(sources.items()):
        # a manifest of the folder's files has the folder's own key: each builds its own all the same
        own = f"cache.dir={tmp_path / f'cache{i}'}"
        config = tiny(*overrides, own, "loop.epochs=1", f"run.name=run{i}")
        prepared = prepare(config.data, config.cache)
        manifest = json.loads((prepared.cache_dir / "manifest.json").read_text())
        shards[name] = [shard["sha256"] for shard in manifest["shards"]]
        assert not prepared.reused
        if name in ("folder", "csv", "parquet", "tar", "folder, s3"):
            fit(config)
            journal = (Path(config.runs.dir) / f"run{i}" / "journal.jsonl").read_text()
            epoch = next(r for r in map(json.loads, journal.splitlines()) if r["kind"] == "epoch")
            losses[name] = (epoch["train_loss"], epoch["val_loss"])
    assert len(set(map(tuple, shards.values()))) == 1, shards
    assert len(set(losses.values())) == 1, losses


# ------------------------------------------------------------------------------------------------ S3
def test_a_folder_on_s3(s3, tmp_path):
    tree = write_tree(tmp_path / "tree", train=3, val=2)
    (tree / "train" / "red" / ".hidden.png").write_bytes(b"x")
    (tree / "train" / "red" / "notes.txt").write_text("x")
    (tree / "train" / "red" / "déjà vu").mkdir()
    (tree / "train" / "red" / "déjà vu" / "a b.png").write_bytes(b"abc")
    (tree / "loose.png").write_bytes(b"x")
    s3.put("odd", tree)
    here, there = list_rows(Data(root=str(tree))), list_rows(Data(root=s3.uri("odd")))
    assert here.path == there.path
    assert here.ignored == there.ignored == {"(in no class folder)": 1, ".txt": 1}
    assert there.root == "s3://pictures/odd"
    for column in ("size", "label", "split", "id"):
        assert np.array_equal(getattr(here, column), getattr(there, column))
    reader = pickle.loads(pickle.dumps(there)).open()
    for i, path in enumerate(there.path):
        assert reader.read(i) == (tree / path).read_bytes()


def test_a_change_in_a_bucket_is_noticed(s3, tmp_path):
    s3.put("moving", write_tree(tmp_path / "tree", train=2, val=1))
    data = Data(root=s3.uri("moving"))
    rows = list_rows(data)
    key = fingerprint(rows, Decode())
    assert fingerprint(list_rows(data), Decode()) == key
    s3.put("moving/train/red/000.png", b"another")
    with pytest.raises(
        UserError, match="must not change while it is prepared, but 's3://pictures/"
    ):
        rows.open().read(rows.path.index("train/red/000.png"))
    assert fingerprint(list_rows(data), Decode()) != key


def test_a_manifest_names_objects_and_must_not_leave_its_folder(s3, tmp_path):
    s3.put("store", write_tree(tmp_path / "tree", train=3, val=1))
    s3.put("other/1.png", b"one")
    lines = ["path,label"]
    lines += [f"train/{c}/00{i}.png,{c}" for c in ("red", "blue") for i in range(3)]
    s3.put("store/a.csv", "\n".join([*lines, "s3://pictures/other/1.png,red"]).encode())
    rows = list_rows(Data(source="manifest", root=s3.uri("store/a.csv")))
    assert len(rows) == 7
    assert rows.path[0] == "s3://pictures/other/1.png"
    assert rows.open().read(0) == b"one"
    s3.put("store/b.csv", "\n".join([*lines, "../other/1.png,red", "train/red/9.png,red"]).encode())
    with pytest.raises(UserError) as caught:
        list_rows(Data(source="manifest", root=s3.uri("store/b.csv")))
    assert "b.csv row 8, column 'path': must stay below the manifest's folder" in str(caught.value)
    assert "b.csv row 9, column 'path': must name a file" in str(caught.value)
    s3.put("store/c.csv", "\n".join([*lines, f"{(tmp_path / 'tree').as_uri()}/x,red"]).encode())
    with pytest.raises(UserError, match="row 8, column 'path': must stay below"):
        list_rows(Data(source="manifest", root=s3.uri("store/c.csv")))


def refusal(root, **keys):
    started = time.monotonic()
    with pytest.raises(UserError) as caught:
        list_rows(Data(root=root, **keys))
    assert time.monotonic() - started < 15
    assert "secret" not in str(caught.value)
    return str(caught.value)


def test_what_cannot_be_read_is_said_in_a_line(s3):
    nowhere = s3.uri("x").replace("pictures", "nowhere")
    assert "bucket that does not exist" in refusal(nowhere)
    assert "does not exist" in refusal(s3.uri("nothing/here"))
    assert "is no file" in refusal(s3.uri("nothing/a.csv"), source="manifest")
    assert "does not exist" in refusal(s3.uri("nothing-{0..3}.tar"), source="tar")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    dead = f"s3://pictures/x?endpoint_override=http://127.0.0.1:{port}&region=us-east-1"
    message = refusal(dead)
    assert "cannot be reached; check the network" in message
    assert "s3://pictures/x" in message
    assert "must be a path, or a URI of s3://, gs:// or file://" in refusal("ftp://host/x")
    assert "Unexpected query parameter" in refusal("s3://pictures/x?regoin=here")


@pytest.mark.parametrize(
    "root",
    [
        "s3://someone:secret@pictures/x",
        "s3://pictures/x?access_key=me&secret_key=secret",
        "gs://secret@pictures/x",
    ],
)
def test_a_uri_holds_no_credentials(root):
    message = refusal(root)
    assert "must hold no credentials" in message
    assert "CREDENTIALS" in message or "AWS_ACCESS_KEY_ID" in message


def test_places():
    assert locate("s3://b/a/x-00?.tar?region=eu", "k") == Place("s3", "b/a/x-00?.tar", "region=eu")
    assert locate("s3://b/a b/é.tar", "k").path == "b/a b/é.tar"
    assert locate("file:///a%20b/c", "k") == Place("", "/a b/c")
    assert locate("gs://anonymous@b/x", "k") == Place("gs", "b/x", "", "anonymous")
    assert str(locate("s3://b/a/?region=eu", "k").join("c")) == "s3://b/a/c"


def test_a_uri_stays_as_it_is_in_a_run(tiny, s3, monkeypatch, tmp_path):
    from potstill.config import resolve_paths

    learns = ("task=distil", "teacher.run=teacher", "data.unlabeled=more")
    config = tiny(f"data.root={s3.uri('colours')}", *learns)
    before = config_hash(config)
    monkeypatch.chdir(tmp_path)
    resolve_paths(config)
    assert config.data.root == s3.uri("colours")
    assert config.data.unlabeled == f"{os.path.realpath(tmp_path)}/more"
    assert before != config_hash(config)  # the relative path meant another folder
