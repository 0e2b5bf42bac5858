"""Manifests and Parquet shards: what they may say, and what is refused by row and column."""

import json
import os
import pickle
import re
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from potstill.config import Columns, Data, Decode, Split
from potstill.data.sources import fingerprint, list_rows
from potstill.errors import UserError


def fill(root, *paths):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(path.encode())


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def photos(tmp_path):
    """Ten images of each of two classes, and a manifest that names them."""
    root = tmp_path / "photos"
    names = [f"{c}/{i}.jpg" for c in ("oak", "ash") for i in range(10)]
    fill(root, *names)
    write(root / "photos.csv", "path,label\n" + "".join(f"{n},{n[:3]}\n" for n in names))
    return root


def rows_of(path, **keys):
    return list_rows(Data(source="manifest", root=str(path), **keys))


def refusal(path, **keys):
    with pytest.raises(UserError) as caught:
        rows_of(path, **keys)
    return str(caught.value)


def by_path(rows):
    return {p: (rows.names(i), rows.split[i]) for i, p in enumerate(rows.path)}


def changed(photos, *more, header="path,label", keep=20):
    """The manifest with other last rows: row `keep` + 2 is the first of them."""
    lines = (photos / "photos.csv").read_text().splitlines()[1 : keep + 1]
    pad = "," * (header.count(",") - 1)
    text = "\n".join([header, *(line + pad for line in lines), *more]) + "\n"
    return write(photos / "changed.csv", text)


# -------------------------------------------------------------------------------------------- forms
def test_the_split_that_is_made_is_that_of_the_folder(photos):
    rows = rows_of(photos / "photos.csv")
    assert by_path(rows) == by_path(list_rows(Data(root=str(photos))))
    assert Counter(rows.split.tolist()) == {"train": 16, "val": 4}
    assert rows.weight.tolist() == [1.0] * 20
    reader = pickle.loads(pickle.dumps(rows.part(np.arange(5)))).open()
    assert reader.read(3) == rows.path[3].encode()


def test_split_weight_and_names_of_columns(photos):
    lines = [
        "Photo,Kind,Split,W\n",
        "oak/0.jpg, oak ,Training,\n",
        '"oak/1.jpg",oak,valid,0.5\n',
        "./ash/../ash/0.jpg,ash,train,2\n",
        "\n",
        "ash/1.jpg,ash,testing,0\n",
    ]
    path = write(photos / "own.csv", "\ufeff" + "".join(lines))
    rows = rows_of(path, columns=Columns(image="Photo", label="Kind", weight="W"))
    assert by_path(rows) == {
        "oak/0.jpg": ("oak", "train"),
        "oak/1.jpg": ("oak", "val"),
        "ash/0.jpg": ("ash", "train"),
        "ash/1.jpg": ("ash", "test"),
    }
    assert dict(zip(rows.path, rows.weight, strict=True))["oak/1.jpg"] == 0.5


def test_tabs_and_json_lines_and_numbers_as_labels(photos):
    names = [f"oak/{i}.jpg" for i in range(8)]
    tabs = write(photos / "a.tsv", "path\tlabel\n" + "".join(f"{n}\t{n[4]}\n" for n in names))
    objects = [{"path": n, "label": int(n[4]), "more": None} for n in names]
    lines = write(photos / "a.jsonl", "\n".join(map(json.dumps, objects)) + "\n")
    table = pa.table({"path": names, "label": pa.array([float(n[4]) for n in names])})
    pq.write_table(table, photos / "a.parquet")
    for path in (tabs, lines, photos / "a.parquet"):
        data = Data(source="manifest", root=str(path), split=Split(val=1))
        rows = list_rows(data, for_training=False)
        assert rows.classes == list("01234567")
        assert rows.path == names


def test_a_weight_changes_the_key(photos):
    keys = set()
    for weight in ("1", "1.5"):
        path = changed(photos, f"ash/9.jpg,ash,{weight}", header="path,label,weight", keep=19)
        keys.add(fingerprint(rows_of(path), Decode()))
    assert len(keys) == 2


def test_several_labels(photos):
    lines = [
        '{"path": "oak/0.jpg", "label": ["tall", "green"]}',
        '{"path": "oak/1.jpg", "label": []}',
        '{"path": "oak/2.jpg", "label": "green|old|green"}',
        '{"path": "oak/3.jpg", "label": null}',
        *(f'{{"path": "ash/{i}.jpg", "label": "green"}}' for i in range(10)),
    ]
    path = write(photos / "many.jsonl", "\n".join(lines))
    rows = rows_of(path, multi_label=True)
    assert rows.classes == ["green", "old", "tall"]
    names = {p: rows.names(i) for i, p in enumerate(rows.path)}
    assert [names[f"oak/{i}.jpg"] for i in range(4)] == ["green|tall", "", "green|old", ""]
    label = dict(zip(rows.path, rows.label.tolist(), strict=True))
    assert [label[f"oak/{i}.jpg"] for i in range(4)] == [2, 3, 1, 3]  # the rarest; 3 is none
    # an image is filed under its rarest class, whatever classes are selected
    some = rows_of(path, multi_label=True, classes=["green", "tall"])
    assert some.classes == ["green", "tall"]
    splits = dict(zip(rows.path, rows.split, strict=True))
    assert len(some) == 12
    assert all(splits[p] == s for p, s in zip(some.path, some.split, strict=True))
    keys = {fingerprint(r, Decode()) for r in (rows, some)}
    write(path, path.read_text().replace('"tall", "green"', '"tall"'))
    assert fingerprint(rows_of(path, multi_label=True), Decode()) not in keys


# -------------------------------------------------------------------------------------------- groups
def test_a_group_never_straddles_a_made_split(photos):
    lines = [f"{c}/{i}.jpg,{c},{c}{i // 2}" for c in ("oak", "ash") for i in range(10)]
    lines[0] = lines[0][:-4] + "both"  # a group that spans the classes
    lines[1], lines[10] = lines[1][:-4] + "both", lines[10][:-4] + "both"
    sides = Counter()
    before = None
    for seed in range(20):
        path = changed(photos, *lines, header="path,label,group", keep=0)
        rows = rows_of(path, split=Split(val=0.2, seed=seed))
        split = dict(zip(rows.path, rows.split, strict=True))
        assert split != before
        before = split
        backwards = changed(photos, *lines[::-1], header="path,label,group", keep=0)
        again = rows_of(backwards, split=Split(val=0.2, seed=seed))
        assert again.split.tolist() == rows.split.tolist()
        groups = {}
        for line in lines:
            name, _, group = line.split(",")
            groups.setdefault(group, set()).add(split[name])
        assert all(len(sides) == 1 for sides in groups.values())
        sides.update(next(iter(groups[g])) for g in ("both", "oak1"))
        for c in ("oak", "ash"):
            on_val = sum(s == "val" for p, s in split.items() if p.startswith(c))
            assert 1 <= on_val <= 4
    assert sides["val"] > 2


def test_one_large_group_does_not_take_the_class_with_it(photos):
    lines = [f"oak/{i}.jpg,oak,{'crowd' if i < 9 else 'one'}" for i in range(10)]
    lines += [f"ash/{i}.jpg,ash," for i in range(10)]
    for seed in range(10):
        path = changed(photos, *lines, header="path,label,group", keep=0)
        rows = rows_of(path, split=Split(seed=seed))
        assert {p for p, s in by_path(rows).items() if s == ("oak", "val")} == {"oak/9.jpg"}


def test_rows_without_a_split_follow_their_group(photos):
    lines = ["oak/0.jpg,oak,val,g", "oak/1.jpg,oak,,g", "oak/2.jpg,oak,,", "ash/0.jpg,ash,,h"]
    path = changed(photos, *lines, header="path,label,split,group", keep=0)
    assert [by_path(rows_of(path))[line[:9]][1] for line in lines] == [
        "val",
        "val",
        "train",
        "train",
    ]


# ----------------------------------------------------------------------------------------- refusals
def test_rows_are_refused_by_row_and_column(photos):
    header = "path,label,split,weight,group"
    cases = {
        "oak/99.jpg,oak,,,": "column 'path': must name a file, got 'oak/99.jpg'",
        "oak,oak,,,": "column 'path': must name a file, got 'oak'",
        ",oak,,,": "column 'path': must be a path or a URL, got ''",
        "../other.jpg,oak,,,": "column 'path': must stay below the manifest's folder",
        "/etc/hostname,oak,,,": "column 'path': must stay below the manifest's folder",
        "file:///etc/hostname,oak,,,": "column 'path': must stay below the manifest's folder",
        "link.jpg,oak,,,": "column 'path': must stay below the manifest's folder",
        "linked/other.jpg,oak,,,": "column 'path': must stay below the manifest's folder",
        "ash/9.jpg,,,,": "column 'label': must name a class, got nothing",
        "ash/9.jpg,oak|ash,,,": "column 'label': must name one class, got 2 ('oak|ash')",
        "ash/9.jpg,ash,dev,,": "column 'split': must be train, val or test, got 'dev'",
        "ash/9.jpg,ash,,much,": "column 'weight': must be a number >= 0, got 'much'",
        "ash/9.jpg,ash,,-1,": "column 'weight': must be a number >= 0, got '-1'",
        "ash/9.jpg,ash,,nan,": "column 'weight': must be a number >= 0, got 'nan'",
        "ash/9.jpg,ash,,inf,": "column 'weight': must be a number >= 0, got 'inf'",
        "oak/0.jpg,oak,,,": "'oak/0.jpg' must be there once, but is changed.csv row 2 too",
        "oak/./0.jpg,ash,,,": "with another label (oak and ash): one is due",
        "ash/9.jpg,ash": "must have 5 cells as the header has, got 2",
    }
    write(photos.parent / "other.jpg", "x")
    (photos / "link.jpg").symlink_to(photos.parent / "other.jpg")
    (photos / "linked").symlink_to(photos.parent)
    for row, expected in cases.items():
        message = refusal(changed(photos, row, header=header, keep=19))
        assert expected in message, message
        assert "changed.csv row 21" in message
    # all of them at once: the first few, and how many there are
    message = refusal(changed(photos, *cases, header=header, keep=18))
    assert "changed.csv row 20, " in message
    assert re.search(r"row 24, .*; and 19 more\. Mend these rows", message)
    # the file itself is fine
    assert len(rows_of(changed(photos, "ash/9.jpg,ash,,,", header=header, keep=19))) == 20


def test_a_group_in_two_splits_is_refused_by_row(photos):
    rows = ["oak/8.jpg,oak,train,g7", "oak/9.jpg,oak,val,g7", "ash/9.jpg,ash,val,g8"]
    message = refusal(changed(photos, *rows, header="path,label,split,group", keep=0))
    assert (
        "changed.csv row 3, column 'group': 'g7' must be in one split, got val here and train in changed.csv row 2"
        in message
    )


def test_columns_that_are_not_there(photos):
    path = photos / "photos.csv"
    message = refusal(path, columns=Columns(label="lable"))
    assert "data.columns.label: photos.csv has no column 'lable'" in message
    assert "did you mean data.columns.label=label? it has path, label" in message
    assert "data.columns.split: photos.csv has no column 'part'" in refusal(
        path, columns=Columns(split="part")
    )
    message = refusal(write(photos / "x.csv", "paths,label\na,b\n"))
    assert "data.columns.image: x.csv has no column 'path or url or" in message
    assert "did you mean data.columns.image=paths?" in message


def test_files_that_are_no_manifests(photos):
    assert "did you mean" in refusal(photos / "photo.csv")
    assert "whose name ends in .csv" in refusal(write(photos / "list.xlsx", "x"))
    assert "must hold rows, got none" in refusal(write(photos / "none.csv", "path,label\n"))
    (photos / "latin.csv").write_bytes("path,label\noak/0.jpg,Ä\n".encode("latin-1"))
    assert "latin.csv row 2 must be UTF-8, got byte 0xc4" in refusal(photos / "latin.csv")
    assert "is no CSV" in refusal(write(photos / "quote.csv", 'path,label\n"oak/0.jpg,oak\n'))
    assert "got 'label' twice" in refusal(write(photos / "two.csv", "path,label,label\na,b,c\n"))
    message = refusal(write(photos / "bad.jsonl", '{"path": "a"}\n[1]\n{"pa'))
    assert "has no column 'label'" in message
    message = refusal(write(photos / "worse.jsonl", "[1]\n"))
    assert "worse.jsonl row 1: must be a JSON object, got '[1]'" in message
    (photos / "torn.parquet").write_bytes(b"PAR1 and no more")
    assert "torn.parquet" in refusal(photos / "torn.parquet")
    with pytest.raises(UserError, match=r"add data\.source=manifest"):
        list_rows(Data(root=str(photos / "photos.csv")))


def test_outside_is_taken_where_it_is_allowed(photos):
    other = write(photos.parent / "other.jpg", "x")
    path = changed(photos, "../other.jpg,oak", f"{other.as_uri()},ash", keep=18)
    message = refusal(path, allow_outside=True)
    assert "must be there once" in message  # they are the same
    rows = rows_of(changed(photos, "../other.jpg,oak", keep=19), allow_outside=True)
    place = rows.path.index(str(other))
    assert rows.open().read(place) == b"x"
    # what is inside may be said in full
    inside = changed(photos, f"{photos}/ash/9.jpg,ash", keep=19)
    assert rows_of(inside).path == rows_of(photos / "photos.csv").path


def test_a_changed_file_is_noticed(photos):
    rows = rows_of(photos / "photos.csv")
    (photos / rows.path[0]).write_bytes(b"something else")
    with pytest.raises(UserError, match="must not change while it is prepared"):
        rows.open().read(0)


# --------------------------------------------------------------------------------------------- http
def test_images_from_a_web_server(photos):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            good = self.path.startswith("/1.jpg")
            self.send_response(200 if good else 404)
            self.end_headers()
            self.wfile.write(b"one" if good else b"")

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        at = f"http://127.0.0.1:{server.server_port}"
        path = changed(photos, f"{at}/1.jpg?signature=secret,oak", f"{at}/2.jpg,ash", keep=18)
        rows = rows_of(path)
        urls = [i for i, p in enumerate(rows.path) if p.startswith("http")]
        assert rows.path[urls[1]] == f"{at}/2.jpg"
        assert rows.path[urls[0]].startswith(f"{at}/1.jpg#")
        assert "secret" not in rows.path[urls[0]]
        assert rows.open().read(urls[0]) == b"one"
        with pytest.raises(OSError, match="404"):
            rows.open().read(urls[1])
    finally:
        server.shutdown()


# ------------------------------------------------------------------------------------------ parquet
def shard(path, images, group=3, names=None, **columns):
    table = pa.table({"image": images, **columns})
    if names:
        about = {"info": {"features": {"label": {"_type": "ClassLabel", "names": names}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(about)})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=group)


def structs(count, start=0, path=None):
    return [
        {"bytes": b"image%d" % i, "path": path and path % i} for i in range(start, start + count)
    ]


def parquet(root, **keys):
    return list_rows(Data(source="parquet", root=str(root), **keys))


def test_shards_of_the_hub(tmp_path):
    names = ["cat", "dog"]
    shard(
        tmp_path / "data" / "train-00000-of-00002.parquet",
        structs(7),
        names=names,
        label=[0, 1, 0, 1, 0, 1, 1],
    )
    shard(
        tmp_path / "data" / "train-00001-of-00002.parquet",
        structs(4, 7),
        names=names,
        label=[0, 1, 0, 1],
    )
    shard(
        tmp_path / "data" / "validation-00000-of-00001.parquet",
        structs(2, 11),
        names=names,
        label=[0, 1],
    )
    rows = parquet(tmp_path)
    assert rows.classes == names
    assert Counter(rows.split.tolist()) == {"train": 11, "val": 2}
    assert rows.path[0] == "data/train-00000-of-00002/000000"
    assert [rows.names(i) for i in range(7)] == ["cat", "dog", "cat", "dog", "cat", "dog", "dog"]
    everything = [b"image%d" % i for i in range(13)]
    reader = rows.open()
    assert [reader.read(i) for i in range(13)] == everything
    at = np.array([12, 3, 9, 0])
    with rows.staged(tmp_path, at) as staged:
        reader = pickle.loads(pickle.dumps(staged.part(at))).open()
        assert [reader.read(i) for i in range(4)] == [everything[i] for i in at]
        assert len(list(tmp_path.glob(".staged*"))) == 1
    assert not list(tmp_path.glob(".staged*"))
    only = parquet(f"{tmp_path}/data/train-{{00000..00001}}-of-00002.parquet")
    assert set(only.path) == {p[5:] for p in rows.path if "train" in p}


def test_names_in_a_shard_count_where_they_are_one_each(tmp_path):
    shard(tmp_path / "a.parquet", structs(6, path="x/%d.jpg"), label=list("ababab"))
    assert parquet(tmp_path).path == [f"x/{i}.jpg" for i in range(6)]
    shard(tmp_path / "b.parquet", structs(6, path="x/%d.jpg"), label=list("ababab"))
    assert parquet(tmp_path).path[:2] == ["a/000000", "a/000001"]


def test_bytes_in_a_column_and_files_that_a_struct_names(tmp_path):
    images = pa.array([b"image%d" % i for i in range(6)], pa.binary())
    shard(
        tmp_path / "plain.parquet",
        images,
        label=list("ababab"),
        name=[f"{i}.jpg" for i in range(6)],
    )
    rows = list_rows(Data(source="manifest", root=str(tmp_path / "plain.parquet")))
    assert rows.path == [f"{i}.jpg" for i in range(6)]
    assert rows.open().read(4) == b"image4"
    fill(tmp_path, *(f"x/{i}.jpg" for i in range(6)))
    outside = [{"bytes": None, "path": f"x/{i}.jpg"} for i in range(6)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    shard(tmp_path / "paths.parquet", pa.array(outside, kind), label=list("ababab"))
    rows = list_rows(Data(source="manifest", root=str(tmp_path / "paths.parquet")))
    assert rows.open().read(4) == b"x/4.jpg"


def test_faults_of_shards(tmp_path):
    names = ["cat", "dog"]
    labels = [0, 1, 2, -1, None, 1]
    shard(tmp_path / "a.parquet", structs(6), names=names, label=labels)
    with pytest.raises(UserError) as caught:
        parquet(tmp_path)
    for row, text in ((3, "below 2"), (4, "below 2"), (5, "got nothing")):
        assert f"a.parquet row {row}, column 'label': " in str(caught.value)
        assert text in str(caught.value)
    with pytest.raises(UserError, match="which holds none"):
        parquet(make_folder(tmp_path / "none"))
    with pytest.raises(UserError, match=r"b-0.parquet' and 1 more that it names does not exist"):
        parquet(tmp_path / "b-{0..1}.parquet")


def make_folder(path):
    path.mkdir()
    return path


def test_a_shard_that_changed_is_noticed(tmp_path):
    shard(tmp_path / "a.parquet", structs(6), label=list("ababab"))
    rows = parquet(tmp_path)
    key = fingerprint(rows, Decode())
    os.utime(tmp_path / "a.parquet", ns=(10**18, 10**18))
    with pytest.raises(UserError, match="must not change"):
        rows.open().read(0)
    with pytest.raises(UserError, match="must not change"), rows.staged(tmp_path, np.arange(2)):
        pass
    assert fingerprint(parquet(tmp_path), Decode()) != key
