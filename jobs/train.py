"""Train one model: a teacher, or a student with or without one.

  uv run jobs/train.py data.root=<folder of class folders> model.name=resnet18
  uv run jobs/train.py experiment=seedlings_teacher data.root=<folder>
  uv run jobs/train.py task=distil teacher.run=runs/<teacher> data.root=<folder>

The same command again goes on where an unfinished run stopped, and prints a finished one's summary.
"""

from potstill.config import Config, job


@job("train")
def main(config: Config) -> None:
    from potstill.fit import fit

    fit(config)


if __name__ == "__main__":
    main()
