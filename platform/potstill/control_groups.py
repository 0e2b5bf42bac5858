"""What this process may take of the machine, in a container or a job of a queue: Linux's control groups, version 1 or 2."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Groups:
    """Where they are read."""

    root: Path = Path("/sys/fs/cgroup")
    own: Path = Path("/proc/self/cgroup")

    def cores(self) -> float | None:
        """None where all may be used."""
        return min((cores for cores, _ in self._limits()), default=None)

    def _limits(self) -> list[tuple[float, Path]]:
        found = []
        for folder in self._ladder("cpu"):
            with suppress(OSError, ValueError, ZeroDivisionError):
                if (folder / "cpu.max").exists():
                    quota, period = (folder / "cpu.max").read_text().split()
                else:
                    quota = (folder / "cpu.cfs_quota_us").read_text()
                    period = (folder / "cpu.cfs_period_us").read_text()
                if float(quota) > 0:  # not "max", nor -1
                    found.append((float(quota) / float(period), folder))
        return found

    def busy_s(self) -> float | None:
        """Seconds of a core that the group of `cores` has used since it was made; our own group, where none is limited."""
        limited = [folder for _, folder in sorted(self._limits())[:1]]
        for folder in [*limited, *self._ladder("cpu"), *self._ladder("cpuacct")]:
            with suppress(OSError, ValueError, KeyError):
                if (folder / "cpu.max").exists():
                    words = (folder / "cpu.stat").read_text().split()
                    return int(dict(zip(words[::2], words[1::2], strict=False))["usage_usec"]) / 1e6
                return int((folder / "cpuacct.usage").read_text()) / 1e9
        return None

    def memory(self) -> tuple[int, int] | None:
        """(used, limit) in bytes, of the group with the least room. What files have in memory is not counted as used: it
        is dropped when there is need."""
        found = []
        for folder in self._ladder("memory"):
            for limit, usage, prefix in (
                ("memory.max", "memory.current", ""),
                ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
            ):
                with suppress(OSError, ValueError):
                    most = int((folder / limit).read_text())
                    used = int((folder / usage).read_text())
                    words = (folder / "memory.stat").read_text().split()
                    stat = dict(zip(words[::2], map(int, words[1::2]), strict=False))
                    kinds = (f"{prefix}inactive_file", f"{prefix}active_file")
                    found.append((max(0, used - sum(stat.get(k, 0) for k in kinds)), most))
        return min(found, key=lambda pair: pair[1] - pair[0], default=None)

    def processes(self) -> tuple[int, int] | None:
        """(used, limit), threads counted each, of the group with the least room."""
        found = []
        for folder in self._ladder("pids"):
            with suppress(OSError, ValueError):
                most = int((folder / "pids.max").read_text())
                found.append((int((folder / "pids.current").read_text()), most))
        return min(found, key=lambda pair: pair[1] - pair[0], default=None)

    def _ladder(self, controller: str) -> Iterator[Path]:
        """Our group's folders, from the innermost out: each may have a limit."""
        with suppress(OSError):
            for line in self.own.read_text().splitlines():
                _, names, path = line.split(":", 2)
                if names and controller not in names.split(","):
                    continue
                root = self.root
                if names:  # version 1: a tree for each controller
                    root = next((r for r in (root / names, root / controller) if r.is_dir()), root)
                # in a container the path may be that of the host, and its own group stands at the root
                parts = [part for part in path.split("/") if part and part != ".."]
                for length in range(len(parts), -1, -1):
                    yield root.joinpath(*parts[:length])
