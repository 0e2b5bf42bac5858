"""The whole path: a teacher, proof that it is worth learning from, students alone and distilled, compared.

  uv run jobs/distil.py experiment=seedlings_student task=distil distil.teacher=seedlings_teacher data.root=<folder>
  uv run jobs/distil.py experiment=<the student's> teacher.run=runs/<teacher> distil.soft_labels=true data.root=<folder>
  uv run jobs/distil.py --steps experiment=<the student's>            what has been done of this path

It takes the student's config, with its teacher terms. Every step is done once: the same command goes on after a stop,
and after a changed setting only what depends on it runs again.
"""

from potstill.config import Config, job

FLAGS = {"--steps": {"action": "store_true", "help": "show which steps are done, and stop"}}


@job("distil", FLAGS)
def main(config: Config, flags) -> None:
    from potstill.distil import distil, show_steps

    if flags.steps:
        show_steps(config)
    else:
        distil(config, flags.config_dir)


if __name__ == "__main__":
    main()
