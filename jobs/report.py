"""Draw a run's plots and its report.html again, from its journal; with tracking=aim also fill Aim from it.

uv run jobs/report.py from_run=runs/<name>
"""

from potstill.config import ReportConfig, job


@job("report")
def main(config: ReportConfig) -> None:
    from potstill import console, replica, report, runs, tracking
    from potstill.errors import UserError
    from potstill.storage import local_folder

    if config.from_run is None:
        raise UserError(
            "from_run must name the folder of a run, got null; add from_run=runs/<name>"
        )
    run_dir = runs.open_run(config.from_run, "from_run")
    written = report.report(run_dir)
    console.say("\n".join(map(str, written)))
    replica.send_back(config.from_run, "from_run", written)
    if config.tracking.name == "aim":
        repo = local_folder(config.tracking.repo or str(run_dir.parent), "tracking.repo")
        console.say(f"Aim: run {tracking.fill(run_dir, repo, console.warn)} in {repo}")


if __name__ == "__main__":
    main()
