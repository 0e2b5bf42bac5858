"""Measure a finished run, on its own validation images or on a folder that it has never seen.

  uv run jobs/evaluate.py from_run=runs/<name>
  uv run jobs/evaluate.py from_run=runs/<name> data.root=<folder of class folders> metrics=[auc,brier] tta=flip

Classes are matched by name. A folder without train/, val/ or test/ is evaluated whole.
"""

from potstill.config import EvaluateConfig, job


@job("evaluate")
def main(config: EvaluateConfig) -> None:
    from potstill.evaluation import evaluate_run

    evaluate_run(config)


if __name__ == "__main__":
    main()
