"""Check, decode and cache a folder of images; say what is in it and what is wrong with it.

  uv run jobs/prepare.py data.root=<folder of class folders> data.decode.image_px=224

Training does this by itself; the same values of data.* find the cache that was made here.
"""

from potstill.config import PrepareConfig, job


@job("prepare")
def main(config: PrepareConfig) -> None:
    from potstill import console
    from potstill.data.prepare import prepare_shown, print_report

    prepared = prepare_shown(config.data, config.cache)
    print_report(prepared.report, console.standard())
    console.say(f"{'Reused' if prepared.reused else 'Written'}: {prepared.cache_dir}")


if __name__ == "__main__":
    main()
