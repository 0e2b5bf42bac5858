"""What the doctor's checks have in common: their findings, what they were asked for, and a few words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PASS, WARN, FAIL = "pass", "warn", "fail"
FEW_INODES = 10_000


@dataclass(frozen=True)
class Finding:
    """What one check has found."""

    name: str
    status: str
    found: str
    remedies: tuple[str, ...] = ()
    values: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class At:
    """What a check is at now."""

    name: str
    doing: str
    remedy: str = ""
    """What to look after where it gets no further."""


@dataclass(frozen=True)
class Options:
    """What the command was asked for."""

    runs: str = "runs"
    cache: str = "cache"
    local_cache: str | None = None
    repo: str | None = None
    need_gb: float | None = None
    gpus: int | None = None
    address: str | None = None
    wanted: tuple[str, ...] = ()
    node: bool = False
    """This process was started on a node by the doctor that looks at its cluster."""

    def wants(self, *names: str) -> bool:
        return any(name in self.wanted for name in names)


Steps = Iterator[Finding | At]
Problem = tuple[str, str, str]
"""Status, what is wrong, remedy."""


def judged(
    name: str, measured: str, problems: Sequence[Problem], values: Mapping[str, Any] | None = None
) -> Finding:
    """A finding as bad as the worst of its problems."""
    order = (PASS, WARN, FAIL)
    worst = max((p[0] for p in problems), key=order.index, default=PASS)
    found = "; ".join(filter(None, [measured, *(p[1] for p in problems)]))
    remedies = tuple(dict.fromkeys(p[2] for p in problems if p[2]))
    return Finding(name, worst, found, remedies, values or {})


def gigabytes(size: float) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.0f} MB"


def several(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def brief(error: BaseException, most: int = 300) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines)[:most]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


SYNC = "uv sync"


def project() -> tuple[str, list[str]]:
    """What the code says that it needs: versions of Python, and packages. The tree's word goes before the install's."""
    from importlib import metadata

    tree = Path(__file__).resolve().parents[2] / "pyproject.toml"
    if tree.is_file():
        import tomllib

        project = tomllib.loads(tree.read_text())["project"]
        return project["requires-python"], project["dependencies"]
    found = metadata.metadata("potstill")
    return found["Requires-Python"] or "", metadata.requires("potstill") or []


def split_address(address: str) -> tuple[str, int]:
    """Raises ValueError for what is no host:port."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 1 << 16 or "/" in address:
        raise ValueError(address)
    return host.strip("[]"), int(port)
