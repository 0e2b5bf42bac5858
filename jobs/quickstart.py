"""See all of it on handwritten digits: a teacher, students alone and distilled, compared; a few minutes on a CPU.

uv run jobs/quickstart.py
"""

from potstill.config import QuickstartConfig, job


@job("quickstart")
def main(config: QuickstartConfig) -> None:
    from potstill.quickstart import quickstart

    quickstart(config)


if __name__ == "__main__":
    main()
