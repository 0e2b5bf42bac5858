"""Tables of images: a manifest (CSV, TSV, JSONL, Parquet), and Parquet shards in the layout of Hugging Face.

    path,label,split,weight,group          label and path must be there, the rest may (data.columns)
    oak/1.jpg,oak,train,1.0,plant7

An image is a path below the manifest's folder, a URL (s3://, gs://, file://, http://, https://), or, in
Parquet, its bytes. What is wrong with a table is said by row and column, and before an image is read. Rows
are counted as an editor or a spreadsheet counts them: a CSV's header is row 1, a Parquet file's first row is 1.
"""

from __future__ import annotations

import csv
import difflib
import io
import json
import math
import os
import posixpath
import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from potstill.data.files import (
    Files,
    Place,
    Spans,
    Stat,
    at_once,
    changed,
    explained,
    find_files,
    is_uri,
    locate,
    shown,
)
from potstill.data.sources import ALIASES, Entry, Listing, class_name_of
from potstill.errors import UserError

if TYPE_CHECKING:
    from potstill.config import Columns, Data

IMAGE_COLUMNS = ("path", "url", "image", "image.bytes", "file_name", "bytes")
PARQUET_IMAGE_COLUMNS = ("image", "img", "image.bytes", "bytes", *IMAGE_COLUMNS)
NAME_COLUMNS = ("path", "file_name", "filename", "name", "id")
SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
FIRST_FAULTS = 5
MOST_FAULTS = 10_000


def list_manifest(data: Data) -> Listing:
    """The source `manifest`. Raises UserError, which names rows and columns."""
    if data.root is None:
        raise UserError(
            f"data.root must be a manifest ({', '.join(SUFFIXES)}), got null; set data.root=<file>"
        )
    place = locate(data.root, "data.root")
    with explained(place, "data.root"):
        about = place.stat()
    if about is None:
        raise UserError(
            f"data.root must be a manifest ({', '.join(SUFFIXES)}), got {str(place)!r}, which is no file; "
            f"{_nearest(place)}"
        )
    return _list([(place, about)], place.parent, data, str(place), IMAGE_COLUMNS)


def list_parquet(data: Data) -> Listing:
    """The source `parquet`: a file, a folder or a pattern of shards. A shard's name or folder may say its split."""
    base, files = find_files(data.root, (".parquet",), "Parquet shards")
    return _list(files, base, data, shown(str(data.root)), PARQUET_IMAGE_COLUMNS, by_name=True)


def _list(
    files: Sequence[tuple[Place, Stat]],
    base: Place,
    data: Data,
    root: str,
    image_columns: Sequence[str],
    by_name: bool = False,
) -> Listing:
    faults = Faults()
    tables = [_table(place, data.columns, image_columns, faults) for place, _ in files]
    embedded = {table.embedded for table in tables}
    if len(embedded) > 1:
        raise UserError(
            f"data.root must hold images in one way, got bytes in some files and paths in others of {root!r}"
        )
    checks = Checks(data, faults)
    entries: list[Entry] = []
    names = _names(files, tables, base) if tables[0].embedded else [None] * len(tables)
    for number, (table, own_names) in enumerate(zip(tables, names, strict=True)):
        place, (size, mtime_ns) = files[number]
        split = split_of(place) if by_name else ""
        for i, row in enumerate(table.rows):
            where = f"{place.name} row {row}"
            entry = checks.entry(table, i, where)
            entry.split = entry.split or split
            if own_names is not None:
                entry.path, entry.place = own_names[i], (number, table.at[i])
                entry.size, entry.mtime_ns = size // len(table.rows), mtime_ns
            entries.append(entry)
    if tables[0].embedded:
        reader: Any = Embedded(files, [table.bytes_column for table in tables])
    else:
        _find(entries, tables, [p for p, _ in files], base, data.allow_outside, faults)
        reader = Files(base)
    checks.across(entries)
    faults.refuse()
    if not entries:
        raise UserError(f"data.root must hold rows, got none in {root!r}")
    return Listing(entries, reader, root)


def split_of(place: Place) -> str:
    """The split that a shard's name (train-00000-of-00004.parquet) or its folder says, or ""."""
    found = re.match(rf"({'|'.join(ALIASES)})(?![a-z])", place.name.lower())
    return ALIASES[found[1]] if found else ALIASES.get(place.parent.name.lower(), "")


# -------------------------------------------------------------------------------------------- faults
class Faults:
    """What is wrong with a source: the first few are said, in the order of their rows, and how many there are."""

    def __init__(self) -> None:
        self._found: list[tuple[str, int, str]] = []
        self._count = 0

    def add(self, where: str, column: str | None, text: str) -> None:
        self._count += 1
        if len(self._found) < MOST_FAULTS:
            name, _, row = where.rpartition(" row ")
            at = f"{where}, column {column!r}" if column else where
            self._found.append((name, int(row) if row.isdecimal() else 0, f"{at}: {text}"))

    def refuse(self) -> None:
        if not self._count:
            return
        first = [text for _, _, text in sorted(self._found)[:FIRST_FAULTS]]
        rest = f"; and {self._count - len(first)} more" if self._count > len(first) else ""
        raise UserError(f"data.root: {'; '.join(first)}{rest}. Mend these rows, or leave them out")


def brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


# -------------------------------------------------------------------------------------------- tables
@dataclass
class _Table:
    """The columns of a file that matter. Cells are None where nothing stands."""

    rows: Sequence[int]
    """As a user counts them."""
    at: Sequence[int]
    """Positions in a Parquet file."""
    image_column: str
    image: list[Any]
    """Paths and URLs; for embedded images their names, if they have any."""
    embedded: bool = False
    bytes_column: str = ""
    columns: dict[str, str] = field(default_factory=dict)
    """label, split, weight, group -> the file's name for it, where it has it."""
    cells: dict[str, list[Any]] = field(default_factory=dict)
    class_names: list[str] | None = None


def _table(place: Place, keys: Columns, image_columns: Sequence[str], faults: Faults) -> _Table:
    end = place.name.rpartition(".")[2].lower()
    with explained(place, "data.root"):
        if end == "parquet":
            return _read_parquet(place, keys, image_columns)
        if f".{end}" not in SUFFIXES:
            raise UserError(
                f"data.root must be a manifest whose name ends in {', '.join(SUFFIXES)}, got {place.name!r}"
            )
        content = place.read()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        row = content[: error.start].count(b"\n") + 1
        raise UserError(
            f"data.root: {place.name} row {row} must be UTF-8, got byte {content[error.start]:#04x}; save it as UTF-8"
        ) from None
    rows, header, cells = (_json_lines if end in ("jsonl", "ndjson") else _csv)(place, text, faults)
    columns = _choose(place, header, keys)
    image = _image_column(place, header, keys.image, image_columns)
    return _Table(
        rows,
        rows,
        image,
        cells[image],
        columns=columns,
        cells={kind: cells[name] for kind, name in columns.items()},
    )


def _csv(
    place: Place, text: str, faults: Faults
) -> tuple[list[int], list[str], dict[str, list[Any]]]:
    csv.field_size_limit(1 << 24)
    delimiter = "\t" if place.name.lower().endswith(".tsv") else ","
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows: list[int] = []
    kept: list[list[str]] = []
    row = 1
    try:
        header = [name.strip() for name in next(lines, [])]
        for row, cells in enumerate(lines, start=2):
            if not cells:
                continue
            if len(cells) != len(header):
                faults.add(
                    f"{place.name} row {row}",
                    None,
                    f"must have {len(header)} cells as the header has, got {len(cells)}",
                )
                continue
            rows.append(row)
            kept.append(cells)
    except csv.Error as error:
        raise UserError(
            f"data.root: {place.name} after row {row} is no CSV: {error}; check the quotes"
        ) from None
    twice = next((name for i, name in enumerate(header) if name in header[:i]), None)
    if twice is not None:
        raise UserError(f"data.root: {place.name} must name each column once, got {twice!r} twice")
    columns = list(zip(*kept, strict=True)) if kept else [()] * len(header)
    return rows, header, {n: list(c) for n, c in zip(header, columns, strict=True)}


def _json_lines(
    place: Place, text: str, faults: Faults
) -> tuple[list[int], list[str], dict[str, list[Any]]]:
    rows: list[int] = []
    objects: list[dict[str, Any]] = []
    header: dict[str, None] = {}
    for row, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            faults.add(
                f"{place.name} row {row}", None, f"must be a JSON object, got {brief(line.strip())}"
            )
            continue
        rows.append(row)
        objects.append(found)
        header.update(dict.fromkeys(found))
    if not objects:
        faults.refuse()
    return rows, list(header), {name: [o.get(name) for o in objects] for name in header}


def _read_parquet(place: Place, keys: Columns, image_columns: Sequence[str]) -> _Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with place.open() as file:
        parquet = pq.ParquetFile(file)
        schema: Any = parquet.schema_arrow
        header = list(schema.names)
        known = [
            *header,
            *(f"{n}.bytes" for n in header if pa.types.is_struct(schema.field(n).type)),
        ]
        image = _image_column(place, known, keys.image, image_columns)
        if image not in header:
            image = image.removesuffix(".bytes")
        columns = _choose(place, header, keys)
        kind, bytes_column, name_column = schema.field(image).type, "", image
        if pa.types.is_struct(kind):
            inner = [kind.field(i).name for i in range(kind.num_fields)]
            if "bytes" in inner and not _all_null(parquet, f"{image}.bytes"):
                bytes_column = f"{image}.bytes"
            name_column = f"{image}.path" if "path" in inner else ""
        elif pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
            bytes_column = image
            texts = (n for n in NAME_COLUMNS if n in header)
            name_column = next((n for n in texts if pa.types.is_string(schema.field(n).type)), "")
        wanted = {*columns.values(), *([name_column] if name_column else [])}
        found = parquet.read(columns=sorted(wanted))
        count = parquet.metadata.num_rows

    def cells(name: str) -> list[Any]:
        top, _, inner = name.partition(".") if name not in header else (name, "", "")
        values = found.column(top).to_pylist()
        return [v and v.get(inner) for v in values] if inner else values

    return _Table(
        range(1, count + 1),
        range(count),
        image,
        cells(name_column) if name_column else [None] * count,
        bool(bytes_column),
        bytes_column,
        columns,
        {kind: cells(name) for kind, name in columns.items()},
        _class_names(schema.metadata, columns["label"]),
    )


def _all_null(parquet: Any, column: str) -> bool:
    """Whether a column holds nothing, by the file's statistics."""
    about = parquet.metadata
    for g in range(about.num_row_groups):
        group = about.row_group(g)
        chunks = [group.column(c) for c in range(group.num_columns)]
        chunk = next(c for c in chunks if c.path_in_schema == column)
        known = chunk.statistics
        if known is None or not known.has_null_count or known.null_count < group.num_rows:
            return False
    return about.num_rows > 0


def _class_names(metadata: dict[bytes, bytes] | None, column: str) -> list[str] | None:
    """The names of a ClassLabel, which Hugging Face keeps in the schema."""
    try:
        feature = json.loads((metadata or {})[b"huggingface"])["info"]["features"][column]
        while "names" not in feature:
            feature = feature[0] if isinstance(feature, list) else feature["feature"]
        return [class_name_of(str(name)) for name in feature["names"]]
    except (KeyError, ValueError, TypeError, IndexError):
        return None


def _choose(place: Place, header: list[str], keys: Columns) -> dict[str, str]:
    """label, split, weight, group -> the file's column. Only the label must be there."""
    chosen = {}
    defaults = type(keys)()
    for kind in ("label", "split", "weight", "group"):
        wanted = getattr(keys, kind)
        if wanted in header:
            chosen[kind] = wanted
        elif kind == "label" or wanted != getattr(defaults, kind):
            raise _no_column(place, header, kind, wanted)
        else:  # a column Split is meant, and must not be passed over
            alike = next((name for name in header if name.lower() == wanted), None)
            chosen |= {kind: alike} if alike else {}
    return chosen


def _image_column(place: Place, header: list[str], wanted: str | None, known: Sequence[str]) -> str:
    if wanted is None:
        found = next((name for name in known if name in header), None)
        if found is None:
            raise _no_column(place, header, "image", " or ".join(dict.fromkeys(known)), known)
        return found
    if wanted not in header:
        raise _no_column(place, header, "image", wanted)
    return wanted


def _no_column(
    place: Place, header: list[str], kind: str, wanted: str, known: Sequence[str] = ()
) -> UserError:
    lower = {name.lower(): name for name in header}
    near = [m for w in (known or [wanted]) for m in difflib.get_close_matches(w.lower(), lower, 1)]
    remedy = f"did you mean data.columns.{kind}={lower[near[0]]}? " if near else ""
    return UserError(
        f"data.columns.{kind}: {place.name} has no column {wanted!r}; {remedy}it has {', '.join(header) or 'none'}"
    )


# --------------------------------------------------------------------------------------------- cells
class Checks:
    """From the cells of a row to an entry; what is wrong with them goes to `faults`."""

    def __init__(self, data: Data, faults: Faults) -> None:
        self.data, self.faults = data, faults
        self._group_column = data.columns.group
        self._where: list[str] = []

    def entry(self, table: _Table, i: int, where: str) -> Entry:
        cells = {kind: values[i] for kind, values in table.cells.items()}
        self._group_column = table.columns.get("group", self._group_column)
        return self.parsed(cells, table.columns, where, table.class_names)

    def parsed(
        self,
        cells: dict[str, Any],
        columns: dict[str, str],
        where: str,
        class_names: list[str] | None,
    ) -> Entry:
        self._where.append(where)
        entry = Entry("", ())
        readings = {
            "label": ("labels", lambda v: labels_of(v, self.data.multi_label, class_names)),
            "split": ("split", split_named),
            "weight": ("weight", weight_of),
            "group": ("group", lambda v: "" if _nothing(v) else str(v)),
        }
        for kind, (name, read) in readings.items():
            if kind in columns:
                try:
                    setattr(entry, name, read(cells[kind]))
                except ValueError as error:
                    self.faults.add(where, columns[kind], str(error))
        return entry

    def across(self, entries: list[Entry]) -> None:
        """What only shows when rows are compared: an image twice, a group in two splits."""
        seen: dict[str, int] = {}
        groups: dict[str, int] = {}
        for i, entry in enumerate(entries):
            first = seen.setdefault(entry.path, i) if entry.path else i
            if first != i:
                other, same = entries[first], entries[first].labels == entry.labels
                text = f"{brief(entry.path)} must be there once, but is {self._where[first]} too"
                if not same and not self.data.multi_label:
                    pair = f"{'|'.join(other.labels or ())} and {'|'.join(entry.labels or ())}"
                    text += (
                        f", with another label ({pair}): one is due, unless data.multi_label=true"
                    )
                self.faults.add(self._where[i], None, text)
            if entry.group and entry.split:
                first = groups.setdefault(entry.group, i)
                other = entries[first]
                if other.split != entry.split:
                    self.faults.add(
                        self._where[i],
                        self._group_column,
                        f"{brief(entry.group)} must be in one split, got {entry.split} here and {other.split} in "
                        f"{self._where[first]}",
                    )


def _nothing(value: Any) -> bool:
    return (
        value is None
        or (isinstance(value, str) and not value.strip())
        or (isinstance(value, float) and math.isnan(value))
    )


def labels_of(
    value: Any, multi_label: bool, class_names: Sequence[str] | None = None
) -> tuple[str, ...]:
    """Class names from a cell: text (with `|` between several), a number, or a list. Raises ValueError."""
    parts = value if isinstance(value, list | tuple) else [value]
    if isinstance(value, str) and "|" in value:
        parts = value.split("|")
    parts = [part for part in parts if not _nothing(part)]
    if not multi_label and len(parts) != 1:
        if not parts:
            raise ValueError("must name a class, got nothing")
        raise ValueError(
            f"must name one class, got {len(parts)} ({brief(value)}); or set data.multi_label=true"
        )
    names = [_class_name(part, class_names) for part in parts]
    return tuple(dict.fromkeys(names))


def _class_name(part: Any, class_names: Sequence[str] | None) -> str:
    if isinstance(part, dict | list | bytes):
        raise ValueError(f"must be text or a number, got {brief(part)}")
    if isinstance(part, float) and part.is_integer():
        part = int(part)  # where cells are missing, whole numbers come as 3.0
    if class_names is not None and isinstance(part, int) and not isinstance(part, bool):
        if not 0 <= part < len(class_names):
            raise ValueError(
                f"must be an index below {len(class_names)}, of the classes' names, got {part}"
            )
        return class_names[part]
    return class_name_of(str(part).strip())


def split_named(value: Any) -> str:
    """Raises ValueError."""
    if _nothing(value):
        return ""
    split = ALIASES.get(str(value).strip().lower())
    if split is None:
        raise ValueError(f"must be train, val or test, got {brief(value)}")
    return split


def weight_of(value: Any) -> float:
    """Raises ValueError."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return 1.0
    try:
        weight = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"must be a number >= 0, got {brief(value)}") from None
    if not (math.isfinite(weight) and weight >= 0):
        raise ValueError(f"must be a number >= 0, got {brief(value)}")
    return weight


# --------------------------------------------------------------------------------------------- files
def _find(
    entries: list[Entry],
    tables: Sequence[_Table],
    files: Sequence[Place],
    base: Place,
    allow_outside: bool,
    faults: Faults,
) -> None:
    """Give the entries the files that their rows name, with sizes and times. All of them must be there."""
    finder = _Finder(base, allow_outside)
    remote: list[tuple[Entry, str, str, str]] = []
    left = iter(entries)
    for table, place in zip(tables, files, strict=True):
        for row, text in zip(table.rows, table.image, strict=True):
            entry, where = next(left), f"{place.name} row {row}"
            try:
                if not isinstance(text, str) or not text.strip():
                    raise ValueError(f"must be a path or a URL, got {brief(text)}")
                finder.give(entry, text.strip())
            except ValueError as error:
                faults.add(where, table.image_column, str(error))
                continue
            if isinstance(entry.place, Place) and not entry.place.local:
                remote.append((entry, where, table.image_column, text))
    with explained(base if not base.local or not remote else remote[0][0].place, "data.root"):
        found = at_once(lambda item: item[0].place.stat(), remote)
    for (entry, where, column, text), about in zip(remote, found, strict=True):
        if about is None:
            faults.add(
                where, column, f"must name a file, got {brief(shown(text))}, which does not exist"
            )
        else:
            entry.size, entry.mtime_ns = about


class _Finder:
    """From a manifest's path or URL to a place that it may name."""

    def __init__(self, base: Place, allow_outside: bool) -> None:
        self.base, self.allow_outside = base, allow_outside
        self._real = os.path.realpath(base.path) if base.local else ""
        self._folders: dict[str, bool] = {}

    def give(self, entry: Entry, text: str) -> None:
        """Sets path and place, and of local files size and time. Raises ValueError."""
        if re.match(r"https?://", text, re.IGNORECASE):
            entry.path, entry.place = _name_of_url(text), text
            return
        if is_uri(text):
            place = locate(text, "it")
            if place.scheme == self.base.scheme and not place.options:
                place = Place(place.scheme, place.path, self.base.options, place.user)
        elif self.base.local:
            path = os.path.expanduser(text) if text.startswith("~/") else text
            place = Place("", os.path.normpath(os.path.join(self.base.path, path)))
        else:
            inner = posixpath.normpath(text)
            if inner.startswith(("..", "/")):
                self._refuse(text)
            place = self.base.join(inner)
        if not place.local:
            prefix = f"{self.base.path}/"
            below = place.scheme == self.base.scheme and place.path.startswith(prefix)
            entry.path = place.path[len(prefix) :] if below else str(place)
            entry.place = place
            return
        inside = self.base.local and self._inside(place.path)
        if not inside and not self.allow_outside:
            self._refuse(text)
        about = place.stat()
        if about is None:
            raise ValueError(f"must name a file, got {brief(text)}, which does not exist")
        entry.size, entry.mtime_ns = about
        prefix = f"{self.base.path.rstrip('/')}/"
        below = self.base.local and place.path.startswith(prefix)
        entry.path = place.path[len(prefix) :] if below else place.path
        entry.place = None if below else place

    def _refuse(self, text: str) -> None:
        raise ValueError(
            f"must stay below the manifest's folder, got {brief(text)}; data.allow_outside=true allows others"
        )

    def _inside(self, path: str) -> bool:
        """Whether a file is below the manifest's folder, links followed."""
        folder = os.path.dirname(path)
        if folder not in self._folders:
            self._folders[folder] = self._below(os.path.realpath(folder))
        if os.path.islink(path):
            return self._below(os.path.realpath(path))
        return self._folders[folder]

    def _below(self, real: str) -> bool:
        return real == self._real or real.startswith(f"{self._real.rstrip('/')}/")


def _name_of_url(url: str) -> str:
    """A URL as a sample's name: without what may be a secret, such as the query that signs it."""
    name = shown(url)
    return name if name == url else f"{name}#{blake2b(url.encode(), digest_size=4).hexdigest()}"


def _nearest(place: Place) -> str:
    if place.local:
        folder = Path(place.path).parent
        names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
        near = difflib.get_close_matches(place.name, names, n=1)
        if near and near[0] != place.name:
            return f"did you mean {str(folder / near[0])!r}?"
    return "check the path"


# ------------------------------------------------------------------------------------ embedded images
def _names(
    files: Sequence[tuple[Place, Stat]], tables: Sequence[_Table], base: Place
) -> list[list[str]]:
    """A name for each embedded image: its own path where all have one that no other has, else <shard>/<row>."""
    own = [
        posixpath.normpath(f"/{text}")[1:] if isinstance(text, str) and text else ""
        for table in tables
        for text in table.image
    ]
    if all(own) and len(set(own)) == len(own):
        left = iter(own)
        return [[next(left) for _ in table.rows] for table in tables]
    prefix = len(base.path.rstrip("/")) + 1
    stems = [place.path[prefix:].removesuffix(".parquet") for place, _ in files]
    return [
        [f"{stem}/{i:06d}" for i in table.at] for stem, table in zip(stems, tables, strict=True)
    ]


class Embedded:
    """Reads images that stand in Parquet files: `entry.place` is (which file, which row).

    Parquet gives whole row groups, and a cache's shard takes its rows from all over a set, so they are staged:
    every row group is read once, and the images are copied to one file to read from in any order.
    """

    def __init__(self, files: Sequence[tuple[Place, Stat]], columns: Sequence[str]) -> None:
        self.files, self.columns = list(files), list(columns)
        self._group: tuple[int, int, list[Any]] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Embedded, (self.files, self.columns)

    def read(self, entry: Entry) -> bytes:
        """Reads a whole row group, and keeps the last one. Raises OSError, and UserError where the file changed."""
        number, row = entry.place
        if (
            self._group is None
            or self._group[0] != number
            or not (0 <= row - self._group[1] < len(self._group[2]))
        ):
            for first, values in self._groups(number, {row}):
                self._group = (number, first, [bytes(v) if v else b"" for v in values])
        assert self._group is not None
        return self._group[2][row - self._group[1]]

    def stage(self, path: Path, entries: list[Entry]) -> Spans:
        """Copy the images of some entries to a file, and change their `place` and `size` to where they are in it."""
        by_file: dict[int, dict[int, Entry]] = {}
        for entry in entries:
            by_file.setdefault(entry.place[0], {})[entry.place[1]] = entry
        offset = 0
        with open(path, "wb") as out:
            for number, wanted in by_file.items():
                for first, values in self._groups(number, wanted):
                    for row, value in enumerate(values, start=first):
                        if (entry := wanted.get(row)) is not None:
                            entry.place, entry.size = (0, offset), len(value or b"")
                            offset += out.write(value or b"")
        place = Place("", str(path))
        info = os.stat(path)
        return Spans([(place, (info.st_size, info.st_mtime_ns))])

    def _groups(self, number: int, wanted: Iterable[int]) -> Iterator[tuple[int, list[Any]]]:
        """(number of the first row, images as buffers) of every row group that holds a wanted row."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        (place, expected), column = self.files[number], self.columns[number]
        with explained(place, "data.root"):
            if place.stat() != expected:
                raise changed(place)
            with place.open() as file:
                parquet = pq.ParquetFile(file)
                rows = sorted(wanted)
                first = 0
                for g in range(parquet.num_row_groups):
                    count = parquet.metadata.row_group(g).num_rows
                    if bisect_left(rows, first) < bisect_left(rows, first + count):
                        found: Any = parquet.read_row_group(g, columns=[column]).column(0)
                        for chunk in found.chunks:
                            values = (
                                chunk.field("bytes") if pa.types.is_struct(chunk.type) else chunk
                            )
                            yield first, [v.as_buffer() for v in values]
                            first += len(values)
                    else:
                        first += count
