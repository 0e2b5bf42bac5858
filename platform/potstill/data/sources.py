"""Rows: what a source lists, its splits and selections, and the key that they make.

A source is a function of the config's `data` to a Listing, found by its name: folder (data/folder.py),
manifest and parquet (data/manifest.py), tar (data/tars.py), or a plug-in's, registered as `source`. All
else is here and the same for every source, so that the same images under the same names have the same
ids, order, splits, shards and pixels wherever they come from.
"""

from __future__ import annotations

import copy
import difflib
import fnmatch
import hashlib
import json
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from potstill.errors import UserError
from potstill.registry import lookup

if TYPE_CHECKING:
    from potstill.config import Data, Decode

SPLITS = ("train", "val", "test")
FORMAT_VERSION = (
    2  # of everything that a key stands for: raise it when the same source gives another cache
)
UNLABELED = -1

ALIASES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}


@dataclass(slots=True)
class Entry:
    """One image candidate of a source."""

    path: str
    """Its name, which no other entry has. Ids, order, made splits and shards depend on it: relative, with forward slashes."""
    labels: tuple[str, ...] | None
    """Names of its classes: one, or several (data.multi_label); None where they are not known."""
    split: str = ""
    """train, val or test; "" until it is made."""
    size: int = 0
    """Bytes, as far as they are known."""
    mtime_ns: int = 0
    """Time of the last change, as far as it is known."""
    weight: float = 1.0
    """What the sample counts in the loss, or in weighted sampling."""
    group: str = ""
    """What must not straddle a split; "" is a group of its own."""
    place: Any = None
    """Where its reader finds it, if the path does not say. It must pickle."""
    home: str = ""
    """The class that it is filed under when a split is made: its only one, or its rarest. Set here, not by a source."""


class Reader(Protocol):
    """Reads a source's entries. It travels to Ray's tasks, so it must pickle.

    One that waits for a network may have `waits(place)`: where it is true, several threads call `read` at once.
    A source whose images are costly to read in any order may have `stage(path, entries)`: it copies them to a file
    at `path`, and returns another reader for these entries, whose `place` and `size` it changes.
    """

    def read(self, entry: Entry, /) -> bytes:
        """The image's file. Raises OSError or images.BadImage (it goes to quarantine), and UserError where the
        source has changed since it was listed (it ends the job)."""
        ...


@dataclass
class Listing:
    """What a source has. `root` is its name in messages, without credentials."""

    entries: list[Entry]
    reader: Reader
    root: str
    ignored: dict[str, int] = field(default_factory=dict)
    """How many files were passed over, by extension."""
    walked: list[Path] = field(default_factory=list)
    """Local folders in which every file counts as an image: the cache must not be in one."""


@dataclass
class Rows:
    """Every image candidate of a source, in the order of its path.

    path: list of N names. size [N] int64, bytes. mtime_ns [N] int64. label [N] int32, index into `classes`; -1
    is unlabelled. labels: None, or with data.multi_label N lists of indices, where `label` is the rarest of them,
    and K, the number of classes, where there is none. weight [N] float32. split [N] str. id [N] int64 >= 0, a
    hash of the path. ignored: how many files were passed over, by extension.
    """

    root: str
    classes: list[str]
    path: list[str]
    size: np.ndarray
    mtime_ns: np.ndarray
    label: np.ndarray
    labels: list[list[int]] | None
    weight: np.ndarray
    split: np.ndarray
    id: np.ndarray
    ignored: dict[str, int]
    walked: list[Path]
    readers: list[Reader]
    reader: np.ndarray
    """[N] int8, index into `readers`."""
    place: list[Any]

    def __len__(self) -> int:
        return len(self.path)

    def part(self, at: np.ndarray) -> Rows:
        """The rows at some positions [n], in their order; small enough to send to a task."""
        part = copy.copy(self)
        part.path, part.place = [self.path[i] for i in at], [self.place[i] for i in at]
        for name in ("size", "mtime_ns", "label", "weight", "split", "id", "reader"):
            setattr(part, name, getattr(self, name)[at])
        part.labels = None if self.labels is None else [self.labels[i] for i in at]
        used = set(part.reader.tolist())
        part.readers = [r if i in used else None for i, r in enumerate(self.readers)]  # type: ignore[misc]
        part.ignored = {}
        return part

    def names(self, i: int) -> str:
        """The classes of a row as text."""
        if self.labels is not None and self.label[i] != UNLABELED:
            return "|".join(self.classes[k] for k in self.labels[i])
        return "" if self.label[i] == UNLABELED else self.classes[self.label[i]]

    def open(self) -> Opened:
        """The reader of these rows' images."""
        return Opened(self)

    def entry(self, i: int) -> Entry:
        """What a reader needs to know of a row."""
        size, mtime_ns = int(self.size[i]), int(self.mtime_ns[i])
        return Entry(self.path[i], None, size=size, mtime_ns=mtime_ns, place=self.place[i])

    @contextmanager
    def staged(self, folder: Path, at: np.ndarray) -> Iterator[Rows]:
        """These rows with readers that read in any order; the files that this takes stand in `folder` meanwhile."""
        rows = copy.copy(self)
        rows.readers, rows.place = list(self.readers), list(self.place)
        made: list[Path] = []
        try:
            for number, reader in enumerate(self.readers):
                stage = getattr(reader, "stage", None)
                mine = at[self.reader[at] == number]
                if stage is None or not len(mine):
                    continue
                made.append(folder / f".staged-{number}.{os.getpid()}.tmp")
                entries = [self.entry(i) for i in mine]
                rows.readers[number] = stage(made[-1], entries)
                for i, entry in zip(mine.tolist(), entries, strict=True):
                    rows.place[i], rows.size[i] = entry.place, entry.size
            yield rows
        finally:
            for path in made:
                path.unlink(missing_ok=True)


class Opened:
    """Reads the images of some rows."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows

    def read(self, i: int) -> bytes:
        """A row's file. Raises OSError, images.BadImage, and UserError where the source has changed."""
        rows = self._rows
        return rows.readers[rows.reader[i]].read(rows.entry(i))

    def waits(self) -> bool:
        """Whether reading waits for a network, and can be done in several threads."""
        rows = self._rows
        asked = {n: getattr(r, "waits", None) for n, r in enumerate(rows.readers)}
        pairs = zip(rows.reader.tolist(), rows.place, strict=True)
        return any(waits(place) for n, place in pairs if (waits := asked[n]))


def list_rows(data: Data, for_training: bool = True) -> Rows:
    """List a source without decoding an image.

    `for_training=False` (to evaluate on a folder) also takes a source of one class or without training
    rows, and `data.split.val=1`, which makes all of it validation where no split is named; where some
    are, they stay what they are.

    Raises UserError where the source or the selection cannot be used.
    """
    source = lookup("source", data.source)
    if not 0 < data.split.val < 1 and (for_training or data.split.val != 1):
        raise UserError(
            f"data.split.val must be > 0 and < 1, got {data.split.val:g}; it is the share of each class that validates"
        )
    listings: list[Listing] = [source(data)]
    root = listings[0].root
    entries = listings[0].entries
    _refuse_several_labels(entries, data)
    rarity = Counter(name for e in entries for name in e.labels or ())
    for entry in entries:
        entry.home = _rarest(entry.labels, rarity)
    # before the selection: what is split off must not depend on it
    _make_split(entries, data)
    entries = _select(entries, data.classes, root)
    unlabeled = _unlabeled(data, listings)
    if for_training:
        _require_two_classes(entries, data, listings[0])
    owner = {id(e): n for n, some in enumerate((entries, unlabeled)) for e in some}
    entries = sorted([*entries, *unlabeled], key=lambda e: e.path)
    if data.max_samples is not None:
        entries = _sample(entries, data.max_samples, data.split.seed)
    classes = sorted({name for e in entries for name in e.labels or ()})
    index = {name: i for i, name in enumerate(classes)} | {"": len(classes)}
    label = [UNLABELED if e.labels is None else index[_rarest(e.labels, rarity)] for e in entries]
    ignored = sum((Counter(listing.ignored) for listing in listings), Counter())
    return Rows(
        root=root,
        classes=classes,
        path=[e.path for e in entries],
        size=np.array([e.size for e in entries], np.int64),
        mtime_ns=np.array([e.mtime_ns for e in entries], np.int64),
        label=np.array(label, np.int32),
        labels=[sorted(index[n] for n in e.labels or ()) for e in entries]
        if data.multi_label
        else None,
        weight=np.array([e.weight for e in entries], np.float32),
        split=np.array([e.split for e in entries]),
        id=_ids([e.path for e in entries]),
        ignored=dict(sorted(ignored.items())),
        walked=[folder for listing in listings for folder in listing.walked],
        readers=[listing.reader for listing in listings],
        reader=np.array([owner[id(e)] for e in entries], np.int8),
        place=[e.place for e in entries],
    )


def fingerprint(rows: Rows, decode: Decode) -> str:
    """The key of the cache that these rows make: 16 hex digits.

    It stands for the names below the root, sizes, times, class names, labels, weights, splits and the decode
    spec, not for where the root is.
    """
    digest = hashlib.blake2b(digest_size=8)
    spec = {"format": FORMAT_VERSION, "decode": asdict(decode), "classes": rows.classes}
    spec |= {"labels": rows.labels}
    digest.update(json.dumps(spec, sort_keys=True).encode())
    digest.update(b"\0".join(os.fsencode(p) for p in rows.path))
    code = {name: i for i, name in enumerate(SPLITS)}
    digest.update(np.array([code[s] for s in rows.split], np.int8).tobytes())
    for column in (rows.size, rows.mtime_ns, rows.label, rows.weight):
        digest.update(np.ascontiguousarray(column).tobytes())
    return digest.hexdigest()


def printable(path: str) -> str:
    """A path that can be written as UTF-8: a file's name may hold bytes that are none."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def class_name_of(text: str) -> str:
    """A class's name as it is compared: macOS writes names decomposed, and the same class must be the same."""
    return unicodedata.normalize("NFC", printable(text))


# ------------------------------------------------------------------------------------------- labels
def _rarest(labels: Sequence[str] | None, rarity: Counter[str]) -> str:
    return min(labels or ("",), key=lambda name: (rarity[name], name))


def _refuse_several_labels(entries: list[Entry], data: Data) -> None:
    """A plug-in's source may give them; ours have said so already, by row and column."""
    for entry in entries:
        if not data.multi_label and entry.labels is not None and len(entry.labels) != 1:
            raise UserError(
                f"data.multi_label must be true where an image has several classes or none, got false and "
                f"{'|'.join(entry.labels) or 'none'} for {entry.path!r}"
            )


def _unlabeled(data: Data, listings: list[Listing]) -> list[Entry]:
    if data.unlabeled is None:
        return []
    from potstill.data.folder import list_unlabeled

    listings.append(list_unlabeled(data.unlabeled))
    return listings[-1].entries


# ----------------------------------------------------------------------------------------- selection
def _select(entries: list[Entry], patterns: list[str] | None, root: str) -> list[Entry]:
    if patterns is None:
        return entries
    names = sorted({name for e in entries for name in e.labels or ()})
    chosen: set[str] = set()
    for pattern in patterns:
        pattern = unicodedata.normalize("NFC", pattern)
        matches = {pattern} if pattern in names else set(fnmatch.filter(names, pattern))
        if not matches:
            lower = {n.lower(): n for n in reversed(names)}
            near = [
                lower[n]
                for n in difflib.get_close_matches(
                    pattern.lower().strip("*?"), lower, n=3, cutoff=0.4
                )
            ]
            hint = f"did you mean {', '.join(near)}?" if near else f"there are {_some(names)}"
            raise UserError(
                f"data.classes: {pattern!r} matches none of the {len(names)} classes of {root!r}; {hint}"
            )
        chosen |= matches
    selected = []
    for entry in entries:
        if labels := tuple(name for name in entry.labels or () if name in chosen):
            entry.labels = labels
            selected.append(entry)
    return selected


def _make_split(entries: list[Entry], data: Data) -> None:
    """Give every entry a split.

    What is made depends on the classes and names of a class's own entries. Whole groups go to one side; one
    that spans classes is filed under the rarest of them, and so is an image of several classes.
    """
    _spread_over_groups(entries)
    present = {e.split for e in entries}
    if "val" in present or (data.split.val == 1 and "" not in present):
        for entry in entries:
            entry.split = entry.split or "train"
        return
    open_to = ("",) if data.split.val == 1 else ("", "train")
    members = [e for e in entries if e.split in open_to]
    sizes = Counter(e.home for e in members)
    units: dict[str, list[Entry]] = {}
    for entry in members:
        units.setdefault(f"/{entry.group}" if entry.group else entry.path, []).append(entry)
    by_class: dict[str, list[tuple[bytes, list[Entry]]]] = {}
    for unit in units.values():
        first = unit[0]
        name = _rarest([e.home for e in unit], sizes)
        rank = _rank(data.split.seed, name, first.group) if first.group else _own_rank(first, data)
        by_class.setdefault(name, []).append((rank, unit))
    for ranked in by_class.values():
        ranked.sort(key=lambda item: item[0])
        for i in _chosen([len(unit) for _, unit in ranked], data.split.val):
            for entry in ranked[i][1]:
                entry.split = "val"
    for entry in members:
        entry.split = entry.split if entry.split == "val" else "train"


def _own_rank(entry: Entry, data: Data) -> bytes:
    return _rank(data.split.seed, entry.home, _inner(entry))


def _chosen(sizes: list[int], share: float) -> list[int]:
    """Which units, in their order, make up about `share` of their images: one at least, and never all."""
    if share == 1:
        return list(range(len(sizes)))
    wanted = max(1, round(share * sum(sizes)))
    chosen: list[int] = []
    taken = 0
    for i, size in enumerate(sizes):
        # each that brings the count nearer to what is wanted
        if len(chosen) < len(sizes) - 1 and 2 * taken + size <= 2 * wanted:
            chosen.append(i)
            taken += size
    if not chosen and len(sizes) > 1:
        chosen = [min(range(len(sizes)), key=lambda i: sizes[i])]
    return chosen


def _spread_over_groups(entries: list[Entry]) -> None:
    """What a group's members say of their split holds for those that say nothing."""
    said: dict[str, Entry] = {}
    for entry in entries:
        if entry.group and entry.split:
            other = said.setdefault(entry.group, entry)
            if other.split != entry.split:
                raise UserError(
                    f"data.columns.group: {entry.group!r} must be in one split, got {other.path!r} in {other.split} and "
                    f"{entry.path!r} in {entry.split}; move one of them"
                )
    for entry in entries:
        if entry.group in said:
            entry.split = said[entry.group].split


def _require_two_classes(entries: list[Entry], data: Data, listing: Listing) -> None:
    names = sorted({name for e in entries for name in e.labels or ()})
    root = listing.root
    selected = "" if data.classes is None else f" that data.classes={data.classes} selects"
    if len(names) < 2:
        hint = "see data.columns.label"
        if data.classes is not None:
            hint = "select more"
        elif data.source == "folder":
            hint = _folder_hint(listing, names)
        raise UserError(
            f"data.root must hold at least 2 classes{selected}, got {len(names)} ({_some(names)}) in {root!r}; {hint}"
        )
    trained = {name for e in entries if e.split == "train" for name in e.labels or ()}
    if len(trained) < 2:
        raise UserError(
            f"data.root must hold training images of at least 2 classes{selected}, got {len(trained)} in {root!r}; "
            + (
                "put a folder a class below train/"
                if data.source == "folder"
                else "mend the splits"
            )
        )
    if not any(e.split == "val" for e in entries):
        raise UserError(
            f"data.root must hold validation images, got none in {root!r}: no class has the 2 images (or groups) that a "
            "split needs; add images, or a val/ folder"
        )
    for split in ("train", "val"):
        if not any(e.weight > 0 for e in entries if e.split == split):
            raise UserError(
                f"data.columns.weight must be above 0 for some images of every split, got 0 for all of {split} in {root!r}"
            )


def _folder_hint(listing: Listing, names: list[str]) -> str:
    from potstill.data.folder import _TREE, looks_like_root

    for folder in listing.walked[:1]:
        if names and looks_like_root(folder / names[0]):
            return f"did you mean data.root={folder / names[0]}?"
    return _TREE


def _sample(entries: list[Entry], wanted: int, seed: int) -> list[Entry]:
    """The splits keep their proportions, what is unlabelled too; within a split, classes take turns."""
    by_split: dict[str, list[Entry]] = {}
    for split in (*SPLITS, "unlabelled"):
        members = [e for e in entries if ("unlabelled" if e.labels is None else e.split) == split]
        if members:
            by_split[split] = members
    least = 2 * len(by_split)
    if wanted < least:
        raise UserError(
            f"data.max_samples must be >= {least} (2 for each of {', '.join(by_split)}), got {wanted}"
        )
    if wanted >= len(entries):
        return entries
    quota = {s: max(2, int(wanted * len(m) / len(entries))) for s, m in by_split.items()}
    quota[max(quota, key=lambda s: quota[s])] += wanted - sum(quota.values())
    kept = []
    for split, members in by_split.items():
        members.sort(key=lambda e: _rank(seed, e.home, _inner(e)))
        turn: Counter[str] = Counter()
        order = []
        for entry in members:
            order.append((turn[entry.home], entry.home, entry))
            turn[entry.home] += 1
        order.sort(key=lambda item: item[:2])
        kept += [entry for _, _, entry in order[: quota[split]]]
    return sorted(kept, key=lambda e: e.path)


def _inner(entry: Entry) -> str:
    """The name below the class folder, if there is one: where a tree stands, and whether as train/, is no matter."""
    inner = entry.path
    head, slash, tail = inner.partition("/")
    if slash and head.lower() in ALIASES:
        inner = tail
    head, slash, tail = inner.partition("/")
    return tail if slash and class_name_of(head) == entry.home else inner


def _rank(seed: int, class_name: str, inner: str) -> bytes:
    return hashlib.blake2b(
        f"{seed}\0{class_name}\0".encode() + os.fsencode(inner), digest_size=8
    ).digest()


def _ids(paths: Iterable[str]) -> np.ndarray:
    digests = b"".join(hashlib.blake2b(os.fsencode(p), digest_size=8).digest() for p in paths)
    ids = (np.frombuffer(digests, ">u8") >> 1).astype(np.int64)
    if len(np.unique(ids)) < len(ids):
        raise UserError(
            "data.root holds two paths with the same id (a hash of the path); rename a folder"
        )
    return ids


def _some(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")
