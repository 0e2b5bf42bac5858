"""Find the best student for a budget: many trainings over a space of settings, by Ray Tune.

  uv run jobs/tune.py search=quickstart                                  on scikit-learn's digits, 2 minutes on 2 cores
  uv run jobs/tune.py search=joint data.root=<folder> teacher.run=runs/<teacher>
  uv run jobs/tune.py search=distil_weights experiment=<a student's> search.num_samples=40 search.max_hours=2
  uv run jobs/train.py --config-dir runs/<the search> experiment=best      the winner, as it is

Spaces are files of conf/search/, and settings of the config (search.space): docs/search.md. The same command again goes on
where an unfinished search stopped; with a higher search.num_samples it goes on with a finished one.
"""

from potstill.config import Config, job


@job("tune", {"--best": {"action": "store_true", "help": "show the best so far, and stop"}})
def main(config: Config, flags) -> None:
    from potstill.search import show_best, tune

    if flags.best:
        show_best(config, flags.config_dir)
    else:
        tune(config, flags.config_dir)


if __name__ == "__main__":
    main()
