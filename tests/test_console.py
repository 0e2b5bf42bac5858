"""The lines that a user and a script read."""

from __future__ import annotations

import io
import re
import time

import pytest
from rich.console import Console

from potstill.console import EpochPrinter, duration, progress, say, table
from synthetic_runs import attempt, epoch, step


def plain(width: int = 40) -> Console:
    return Console(file=io.StringIO(), width=width, highlight=False)


def terminal() -> Console:
    return Console(file=io.StringIO(), width=120, force_terminal=True, legacy_windows=False)


def text(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_an_epoch_is_printed_from_the_records_own_floats():
    console = plain()
    printer = EpochPrinter("oaks", console)
    record = epoch(
        3,
        train_loss=9.16214,
        train_top1_acc=0.0,
        train_top5_acc=0.2,
        val_loss=9.53935,
        top_k=5,
        best=False,
    )
    warning = {"name": "collapsed", "message": "all predictions are [rubra]"}
    for one in (
        attempt(epochs=15),
        step(17),
        {**record, "val_top1_acc": 0.004, "val_top5_acc": 12.345, "warnings": [warning]},
    ):
        printer.handle(one)
    printer.close()
    assert text(console).splitlines() == [
        "oaks: 15 epochs of 8 updates on 1 worker, cpu",
        "Epoch 3/15",
        "Train - Loss: 9.1621, Top-1: 0.00%, Top-5: 0.20%",
        "Val - Loss: 9.5394, Top-1: 0.00%, Top-5: 12.35%",
        "654 img/s, 12 s, 12 s left",
        "! collapsed: all predictions are [rubra]",
    ]


def test_best_epoch_is_marked_and_few_classes_have_their_own_k():
    console = plain()
    EpochPrinter("oaks", console).handle(epoch(1, top_k=3, val_loss=float("nan")))
    line = text(console).splitlines()[2]
    assert line.startswith("Val - Loss: nan, ")
    assert ", Top-3: " in line
    assert line.endswith("% *best*")


def test_chosen_and_monitored_metrics_stand_in_the_validation_line():
    console = plain()
    printer = EpochPrinter("oaks", console)
    asked = {"metrics": ["auc", "calibration_error"], "monitor": "val_macro_f1"}
    printer.handle(attempt(**asked))
    record = epoch(1, val_macro_f1=61.239, val_auc=0.98765, val_calibration_error=0.0312, top_k=5)
    printer.handle(record)
    printer.handle(epoch(2, val_auc=float("nan")))
    train, val = text(console).splitlines()[2:4]
    assert train.count(",") == 2
    assert val.endswith(", AUC: 0.9877, Calibration error: 0.0312, Macro-F1: 61.24% *best*")
    assert "AUC: nan, Macro-F1" in text(console)


def test_the_best_of_two_is_told_once_and_several_labels_are_hit():
    console = plain()
    printer = EpochPrinter("oaks", console)
    printer.handle(attempt(task_kind="binary", metrics=["f1"], monitor="val_top1_acc"))
    printer.handle(epoch(1, top_k=1, val_top1_acc=91.0, val_f1=80.0, val_loss=0.25, best=False))
    assert text(console).splitlines()[3] == "Val - Loss: 0.2500, Top-1: 91.00%, F1: 80.00%"
    printer.handle(attempt(task_kind="multi_label"))
    printer.handle(epoch(1, top_k=5, val_top1_acc=91.0, val_top5_acc=99.0, val_loss=0.25))
    assert "Val - Loss: 0.2500, Hit@1: 91.00%, Hit@5: 99.00% *best*" in text(console)


@pytest.mark.parametrize(
    ("record", "line"),
    [
        (
            attempt(2, 12, resumed_from="step-00000012", passed_over=["step-00000016"]),
            "Resumed from step-00000012 (epoch 2, step 12); passed over step-00000016 (damaged)",
        ),
        (
            attempt(2, 16, resumed_from="step-00000016"),
            "Resumed from step-00000016 (after epoch 2, step 16)",
        ),
        (
            attempt(3, 0, passed_over=["step-00000008"]),
            "Starting from the beginning: no valid checkpoint; passed over step-00000008 (damaged)",
        ),
    ],
)
def test_an_attempt_says_where_it_starts(record, line):
    console = plain()
    EpochPrinter("oaks", console).handle(record)
    assert text(console) == line + "\n"


def test_the_end_names_reason_and_best():
    console = plain()
    best = {
        "folder": "step-00000008",
        "step": 8,
        "epoch": 1,
        "metric": "val_top1_acc",
        "value": 55.333,
    }
    EpochPrinter("oaks", console).handle(
        {"kind": "end", "status": "failed", "reason": "the loss is NaN", "best": best}
    )
    assert (
        text(console)
        == "Failed: the loss is NaN. Best val_top1_acc: 55.33% at epoch 1 (step-00000008)\n"
    )


def test_a_log_hears_every_minute_how_far_things_are(monkeypatch):
    """As `ray job logs` shows it: an epoch, or a set, may take hours."""
    from potstill import console as module

    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    log = plain()
    printer = EpochPrinter("oaks", log)
    printer.handle(attempt(epochs=15, steps_per_epoch=5004))
    for at in range(20, 420, 20):
        now[0] += 6.0
        printer.handle(
            {**step(at), "epoch": 3, "epoch_step": at, "loss": 1.25, "images_per_s": 853.0}
        )
    assert text(log).splitlines()[1:] == [
        "Epoch 3/15: update 200 of 5,004, loss 1.2500, 853 img/s, 24 min 01 s left",
        "Epoch 3/15: update 400 of 5,004, loss 1.2500, 853 img/s, 23 min 01 s left",
    ]
    log = plain()
    with progress("Preparing images", 1000, log) as update:
        for done in (500, 600, 700):  # a half stood there
            update(done)
            now[0] += 40.0
    assert text(log).splitlines() == [
        "Preparing images: 700 of 1,000, 2 min 00 s left",
        "Preparing images: 700 in 2 min 00 s",
    ]


def test_a_terminal_has_a_bar_that_gives_way_to_the_epochs_lines():
    console = terminal()
    printer = EpochPrinter("oaks", console)
    for record in (attempt(), step(1), step(5)):
        printer.handle(record)
    time.sleep(0.15)
    printer.handle(epoch(1))
    printer.close()
    said = text(console)
    assert "5/8" in said
    assert "loss 0.7333" in said
    assert said.index("5/8") < said.index("Train - Loss: 0.6667")


def test_progress_off_a_terminal_is_one_line():
    console = plain()
    with progress("Reading [x]", 10, console) as update:
        for done in range(11):
            update(done)
    assert text(console) == "Reading [x]: 10 in 0 s\n"


def test_progress_on_a_terminal_appears_only_when_it_lasts(monkeypatch):
    console = terminal()
    with progress("Quick", 10, console) as update:
        update(10)
    assert text(console) == ""
    monkeypatch.setattr("potstill.console.BAR_AFTER_S", 0.05)
    with progress("Slow", 1000, console) as update:
        update(7)
        deadline = time.monotonic() + 10
        while "7/1,000" not in text(console) and time.monotonic() < deadline:
            time.sleep(0.05)
    assert "7/1,000" in text(console)
    assert re.search(r"Slow: 7 in \d+ s(\x1b\[0m)?\n$", text(console))


def test_progress_takes_its_bar_away_when_the_work_fails(monkeypatch):
    monkeypatch.setattr("potstill.console.BAR_AFTER_S", 0.05)
    console = terminal()

    def work() -> None:
        with progress("Slow", None, console) as update:
            update(1)
            time.sleep(0.3)
            raise RuntimeError("the disk is gone")

    with pytest.raises(RuntimeError, match="the disk is gone"):
        work()
    assert "\x1b[?25h" in text(console)  # the cursor is back


def test_say_and_table_leave_brackets_alone_and_do_not_wrap():
    console = plain(width=30)
    say("[bold] /a/very/long/path/that/is/longer/than/the/console", console=console)
    assert text(console) == "[bold] /a/very/long/path/that/is/longer/than/the/console\n"
    console = plain(60)
    table(["run", "top-1"], [["[alone]", 93.1], ["teacher", "97.2 ± 0.1"]], console=console)
    rows = [
        line.rstrip() for line in text(console).splitlines() if "alone" in line or "teacher" in line
    ]
    assert rows[0].startswith(" [alone]")
    assert len(rows[0]) == len(rows[1])  # numbers stand to the right


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.4, "0 s"),
        (59.6, "1 min 00 s"),
        (185, "3 min 05 s"),
        (7800, "2 h 10 min"),
        (float("nan"), "unknown time"),
    ],
)
def test_duration(seconds, said):
    assert duration(seconds) == said
