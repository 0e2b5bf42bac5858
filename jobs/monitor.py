"""Watch what runs, and on what: runs, searches, GPUs, machine, cache, disks and the Ray cluster.

  uv run jobs/monitor.py                                     runs/ and cache/ on this machine, live; q ends
  uv run jobs/monitor.py --runs /data/runs --cache /data/cache
  uv run jobs/monitor.py --address auto                      on a cluster's head: its nodes, jobs and autoscaler, too
  uv run jobs/monitor.py --once                              once, as text: for pipes and `ray job logs`
  uv run jobs/monitor.py --once --json | jq '.runs[] | {name, epoch, left_s}'

Nothing is changed, and the cluster is not joined. The JSON is described by platform/potstill/monitor.schema.json.
"""

import sys

from potstill import monitor


def main() -> None:
    sys.exit(monitor.command(sys.argv[1:], __doc__))


if __name__ == "__main__":
    main()
