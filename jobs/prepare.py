"""Check, decode and cache a source of images; say what is in it and what is wrong with it.

  uv run jobs/prepare.py data.root=<folder of class folders> data.decode.image_px=224
  uv run jobs/prepare.py --list                  the sets in cache.dir, and who uses them
  uv run jobs/prepare.py --evict <key>           delete a set that nobody uses

Training prepares by itself; the same values of data.* and cache.* find the set that was made here.
"""

from potstill.config import PrepareConfig, job

FLAGS = {
    "--list": {"action": "store_true", "help": "show the sets in cache.dir and stop"},
    "--evict": {
        "metavar": "KEY|lru|all",
        "help": "delete a set, the one unused for longest, or all that nobody uses, and stop",
    },
}


@job("prepare", FLAGS)
def main(config: PrepareConfig, flags) -> None:
    from potstill import console
    from potstill.data import prepare, store

    if flags.evict:
        store.evict(config.cache, flags.evict)
    if flags.list:
        store.print_sets(config.cache)
    if flags.list or flags.evict:
        return
    found = prepare.prepare_shown(config.data, config.cache)
    prepare.print_report(found.report, console.standard())
    console.say(f"{'Reused' if found.reused else 'Written'}: {found.cache_dir}")


if __name__ == "__main__":
    main()
