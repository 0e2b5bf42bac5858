"""Tar shards in the layout of WebDataset, or of a class-folder tree.

    train-{000..099}.tar    a pattern of shards, one file, or a folder of them
      oak/0001.jpg          the files of a sample share the path up to the first dot of the name
      oak/0001.cls          its class: .cls (an index or a name), .json ({"label": …}) or .txt; where
                            there is none, the class folder (oak)

The split is that of the first folder (train/oak/0001.jpg), else the one that the shard's name begins with
(train-000.tar), else it is made. A classes.txt (a name a line) or classes.json (a list) beside the shards
says what the indices in .cls mean. An image is read from where it lies in its shard: nothing is unpacked.
"""

from __future__ import annotations

import functools
import io
import json
import posixpath
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from potstill.data.files import Place, Spans, Stat, at_once, explained, find_files, shown
from potstill.data.manifest import Checks, Faults, split_of
from potstill.data.sources import ALIASES, Entry, Listing, class_name_of
from potstill.errors import UserError

if TYPE_CHECKING:
    from potstill.config import Data

# fmt: off
IMAGES = frozenset((
    "jpg", "jpeg", "jpe", "jfif", "png", "webp", "bmp", "tif", "tiff", "gif", "ppm", "pgm", "pbm", "pnm", "jp2", "j2k",
    "avif", "mpo",
))
# fmt: on
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
MAX_LABEL_BYTES = 1 << 20
READ_AHEAD_BYTES = 1 << 20


def list_tar(data: Data) -> Listing:
    """The source `tar`. Raises UserError, which names the shard and the member."""
    base, files = find_files(data.root, (".tar", *COMPRESSED), "tar shards")
    for place, _ in files:
        if place.name.lower().endswith(COMPRESSED):
            raise UserError(
                f"data.root must be tars without compression, to be read from any place, got {str(place)!r}; unpack the "
                f"outer layer (gunzip {place.name}, say): images are compressed already"
            )
    root = shown(str(data.root))
    chosen = data.columns.image
    places = [place for place, _ in files]
    end = chosen.lower().lstrip(".") if chosen else ""
    shards = at_once(lambda file: _members(*file, end), files)
    faults, ignored = Faults(), Counter[str]()
    checks = Checks(data, faults)
    class_names = _class_names(base)
    above = _folder_above(
        [key for s in shards for key, sample in s.samples.items() if sample.images]
    )
    entries: list[Entry] = []
    for number, ((place, (_, mtime_ns)), shard) in enumerate(zip(files, shards, strict=True)):
        ignored.update(shard.ignored)
        for key, sample in shard.samples.items():
            where = f"{place.name} member {key!r}"
            names = [end] if end else sorted(sample.images)
            names = [name for name in names if name in sample.images]
            if len(names) != 1:
                if not names:
                    ignored["(no image in the sample)"] += 1
                else:
                    text = f"must have one image, got .{' and .'.join(names)}; choose with data.columns.image={names[0]}"
                    faults.add(where, None, text)
                continue
            name, offset, size = sample.images[names[0]]
            key, name = key.removeprefix(above), name.removeprefix(above)
            entry = _entry(key, sample, where, checks, class_names)
            entry.split = entry.split or split_of(place)
            entry.path, entry.place = name, (number, offset)
            entry.size, entry.mtime_ns = size, mtime_ns
            entries.append(entry)
    if len({e.path for e in entries}) < len(entries):
        _name_by_shard(entries, places)
    checks.across(entries)
    faults.refuse()
    if not entries:
        seen = ", ".join(f"{n} {kind}" for kind, n in ignored.items()) or "nothing"
        raise UserError(f"data.root must hold images in its tars, got {seen} in {root!r}")
    return Listing(entries, Spans(files), root, dict(ignored))


def _folder_above(keys: list[str]) -> str:
    """What `tar cf photos.tar photos` puts before every name: folders that all lie in, above the classes."""
    folders = [key.split("/")[:-1] for key in keys]
    depth = 0
    while folders and all(len(f) > depth + 1 for f in folders):
        names = {f[depth] for f in folders}
        if len(names) > 1 or next(iter(names)).lower() in ALIASES:
            break
        depth += 1
    return "".join(f"{name}/" for name in folders[0][:depth]) if depth else ""


def _name_by_shard(entries: list[Entry], places: list[Place]) -> None:
    """Shards often count from 0 each: then their names keep the images apart."""
    stems = [place.name.removesuffix(".tar") for place in places]
    if len(set(stems)) == len(stems):
        for entry in entries:
            entry.path = f"{stems[entry.place[0]]}/{entry.path}"


# ------------------------------------------------------------------------------------------- members
@dataclass
class _Sample:
    images: dict[str, tuple[str, int, int]] = field(default_factory=dict)
    """Extension -> (name, offset, bytes)."""
    texts: dict[str, bytes] = field(default_factory=dict)
    """cls, json, txt -> content."""


@dataclass
class _Shard:
    samples: dict[str, _Sample] = field(default_factory=dict)
    ignored: Counter[str] = field(default_factory=Counter)


@functools.lru_cache(maxsize=4096)
def _members(place: Place, about: Stat, chosen: str) -> _Shard:
    """What is in a tar, by one pass over its headers; a run lists its source twice, and `about` says if it changed."""
    shard = _Shard()
    try:
        with explained(place, "data.root"), place.open() as file:
            for member, archive in _headers(file, place):
                name = posixpath.normpath(member.name).lstrip("/")
                folder, _, base = name.rpartition("/")
                if any(part.startswith(".") for part in name.split("/")):
                    continue
                if not member.isreg():
                    shard.ignored["(no regular file)"] += not member.isdir()
                    continue
                stem, _, end = base.partition(".")
                end = end.lower()
                sample = shard.samples.setdefault(f"{folder}/{stem}" if folder else stem, _Sample())
                if end in IMAGES or end == chosen:
                    if end in sample.images:
                        raise UserError(
                            f"data.root: {place.name} must hold each member once, got {name!r} twice; make the tar again"
                        )
                    sample.images[end] = (name, member.offset_data, member.size)
                elif end in ("cls", "txt", "json") and member.size <= MAX_LABEL_BYTES:
                    content: Any = archive.extractfile(member)
                    sample.texts[end] = content.read()
                else:
                    shard.ignored[f".{end.rpartition('.')[2]}"] += 1
    except tarfile.TarError as error:
        raise UserError(
            f"data.root: {str(place)!r} is no whole tar ({error}); make it again, or fetch it again"
        ) from None
    return shard


def _headers(file: Any, place: Place) -> Iterator[tuple[tarfile.TarInfo, tarfile.TarFile]]:
    # of an object store, a request for every header would take longer than to read on
    stream = file if place.local else io.BufferedReader(file, READ_AHEAD_BYTES)
    with tarfile.open(fileobj=stream, mode="r:") as archive:
        while (member := archive.next()) is not None:
            yield member, archive
            archive.members = []  # type: ignore[attr-defined]  # it would keep them all
        # the library takes any end for the end: a shard that was cut off, or two in one file
        stream.seek(archive.offset)
        rest = stream.read(READ_AHEAD_BYTES)
    if not rest or rest.strip(b"\0"):
        raise tarfile.ReadError("it has no end" if not rest else "there is more behind its end")


# -------------------------------------------------------------------------------------------- labels
_COLUMNS = ("label", "split", "weight", "group")


def _entry(
    key: str, sample: _Sample, where: str, checks: Checks, class_names: list[str] | None
) -> Entry:
    folders = key.split("/")[:-1]
    keys = checks.data.columns
    cells: dict[str, Any] = {}
    columns = {name: getattr(keys, name) for name in _COLUMNS}
    if "json" in sample.texts:
        about = _json(sample.texts["json"], where, checks.faults)
        cells = {name: about[column] for name, column in columns.items() if column in about}
        if "label" not in cells and "labels" in about:
            cells["label"] = about["labels"]
    if "cls" in sample.texts:
        text = _text(sample.texts["cls"])
        indexed = class_names is not None and text.isdecimal()
        cells["label"], columns["label"] = int(text) if indexed else text, ".cls"
    elif "txt" in sample.texts and "label" not in cells:
        cells["label"], columns["label"] = _text(sample.texts["txt"]), ".txt"
    split = ""
    # a class may be called "train", too
    if folders and folders[0].lower() in ALIASES and ("label" in cells or len(folders) > 1):
        split = ALIASES[folders.pop(0).lower()]
    columns = {name: column for name, column in columns.items() if name in cells}
    if "label" not in cells and folders:
        cells["label"], columns["label"] = class_name_of(folders[0]), "(class folder)"
    elif "label" not in cells:
        cells["label"], columns["label"] = None, ".cls, .json or .txt"
    entry = checks.parsed(cells, columns, where, class_names)
    entry.split = entry.split or split
    return entry


def _json(content: bytes, where: str, faults: Faults) -> dict[str, Any]:
    try:
        found = json.loads(content)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        faults.add(where, ".json", "must be a JSON object")
        return {}
    return found


def _text(content: bytes) -> str:
    return content.decode("utf-8", "replace").strip()


def _class_names(folder: Place) -> list[str] | None:
    """classes.txt or classes.json beside the shards: the class names in the order of their index."""
    for name in ("classes.txt", "classes.json"):
        place = folder.join(name)
        with explained(place, "data.root"):
            if place.stat() is None:
                continue
            content = place.read()
        try:
            text = content.decode("utf-8-sig")
            names = json.loads(text) if name.endswith("json") else text.splitlines()
        except ValueError:
            names = None
        if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
            raise UserError(
                f"data.root: {str(place)!r} must be a list of class names in the order of their index; mend it"
            )
        return [class_name_of(n.strip()) for n in names if n.strip()]
    return None
