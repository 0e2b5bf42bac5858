"""Look this machine or cluster over before a long run: what is well, what is not, and what to do about it.

  uv run jobs/doctor.py                                        this machine, runs/ and cache/
  uv run jobs/doctor.py --runs /data/runs --cache s3://bucket/cache --gpus 1
  ray job submit … --working-dir . --runtime-env runtime_env.yaml -- python jobs/doctor.py --gpus 4
                                                               a cluster, every node of it, as a job finds it

Exit status: 0 all is well, or there are warnings; 1 a check has failed (--strict: or warns); 2 wrong usage;
130 stopped before its end.
"""

import sys
from pathlib import Path


def main() -> int:
    if sys.version_info < (3, 11):  # noqa: UP036  # a system's Python is among what there is to find
        version = ".".join(map(str, sys.version_info[:3]))
        print(f" ✗ python  {version}, {sys.executable}; the project needs 3.11 or 3.12")
        print("           → uv run jobs/doctor.py, or uv python install 3.11 && uv sync")
        return 1
    try:
        from potstill import doctor
    except ModuleNotFoundError:  # a Python without the project: that is what the doctor then says
        sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "platform"))
        from potstill import doctor

    return doctor.command(sys.argv[1:], __doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
