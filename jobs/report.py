"""Draw a run's plots and its report.html again, from its journal; with tracking=aim also fill Aim from it.

uv run jobs/report.py from_run=runs/<name>
"""

from potstill.config import ReportConfig, job


@job("report")
def main(config: ReportConfig) -> None:
    from pathlib import Path

    from potstill import console, report, runs, tracking
    from potstill.errors import UserError

    if config.from_run is None:
        raise UserError(
            "from_run must name the folder of a run, got null; add from_run=runs/<name>"
        )
    run_dir = runs.open_run(config.from_run, "from_run")
    for path in report.report(run_dir):
        console.say(str(path))
    if config.tracking.name == "aim":
        repo = Path(config.tracking.repo or run_dir.parent)
        console.say(f"Aim: run {tracking.fill(run_dir, repo, console.warn)} in {repo}")


if __name__ == "__main__":
    main()
