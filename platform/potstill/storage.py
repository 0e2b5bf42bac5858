"""Where runs and caches are kept: a folder of this machine, or an object store and its copy here.

A relative folder is relative to POTSTILL_HOME where that is set (as on a cluster, where a submitted job's current
folder is a copy of the code that goes with the job), else to the current one.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path


def is_uri(text: str) -> bool:
    return "://" in text


def home() -> Path:
    """The folder that relative ones are relative to."""
    return Path(os.environ.get("POTSTILL_HOME") or ".").expanduser().absolute()


def local_folder(text: str, key: str = "runs.dir") -> Path:
    """The folder on this machine of a path or URI: itself, or where the copy of an object store's is kept.

    Nothing is made or fetched. Raises UserError for a URI that is none.
    """
    if not is_uri(text):
        return home() / Path(text).expanduser()
    from potstill.data.files import locate

    place = locate(text, key)
    if place.local:
        return Path(place.path)
    mark = hashlib.sha256(f"{place} {place.options}".encode()).hexdigest()[:8]
    name = re.sub(r"[^\w.-]+", "-", place.path).strip("-")[:60]
    return home() / "copies" / f"{place.scheme}-{name}-{mark}"


def copies_dir() -> Path:
    """Where this node keeps copies of what lies elsewhere: never in a folder that other accounts may write, or make first."""
    if os.environ.get("POTSTILL_HOME"):
        return home() / "copies"
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "potstill"
