"""Keep a teacher's outputs for every crop of the training images, so that students learn from it without running it.

  uv run jobs/soft_labels.py task=distil teacher.run=runs/<teacher> data.root=<folder> augment.views=4
  uv run jobs/train.py       task=distil teacher.soft_labels=<the folder it prints> data.root=<folder> augment.views=4

Takes the config of the training that is to read them: the same images, augmentation, seed and terms. The same
command again goes on where an unfinished one stopped.
"""

from potstill.config import Config, job


@job("soft_labels")
def main(config: Config) -> None:
    from potstill import console
    from potstill.soft_labels import soft_labels

    console.say(f"teacher.soft_labels={soft_labels(config)}")


if __name__ == "__main__":
    main()
