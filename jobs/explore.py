"""Look at runs in Aim's explorer: on this machine, by a link that holds a token, with every run indexed first.

  uv run jobs/explore.py                                     runs/
  uv run jobs/explore.py --runs /data/runs --read-only       other runs, which nobody can rename, archive or delete
  ssh -t -L 43800:127.0.0.1:43800 HOST 'cd potstill && uv run jobs/explore.py'          those of another machine
  uv run jobs/explore.py --index-only                        bring Aim's index up to date and stop

Prints the link; Ctrl-C stops. It listens on 127.0.0.1 alone, and answers no page but its own: see docs/explore.md.
Exit status: 0, also when Ctrl-C ends it while it serves; 130 while it still indexes; 2 wrong usage, or something that
cannot be explored.
"""

import sys

from potstill import explore


def main() -> None:
    sys.exit(explore.command(sys.argv[1:], __doc__ or ""))


if __name__ == "__main__":
    main()
