"""The documentation is run, and what is written down of the keys is what the schema says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT, write_tree
from potstill.config import _as_written, compose, flatten, keys_table, to_dict
from potstill.metric_names import table
from potstill.runs import read_json

DOCS = ROOT / "docs"


@pytest.mark.slow
def test_the_python_page_runs(tmp_path, cache_dir):
    """Its blocks, one after the other, in a process of their own as a user would."""
    write_tree(tmp_path / "tree")
    (tmp_path / "tree" / "train").rename(tmp_path / "photos")
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "python.md").read_text(), re.DOTALL)
    code = []
    for block in blocks:
        if named := re.match(r"# (\w+\.py)\n", block):
            (tmp_path / named[1]).write_text(block)
        else:
            code.append(block)
    assert len(code) == 4
    assert len(blocks) == 5
    (tmp_path / "page.py").write_text("\n".join(code))
    done = subprocess.run(
        [sys.executable, "page.py"], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = done.stdout.splitlines()
    assert any("runs/run-" in line for line in said)
    assert "(2, 4)" in done.stdout, "two images, four classes"
    assert said[-1] == str(16 * 27 + 16 + 4 * 16 + 4), "the plug-in's parameters"
    counts = [read_json(p)["dataset"]["counts"] for p in (tmp_path / "runs").glob("*/run.json")]
    assert {"train": 36, "val": 12} in counts, "the plug-in's split of 48 images"
    assert {"train": 40, "val": 8} in counts, "the folder's"


def test_the_table_of_keys_is_that_of_the_schema():
    """POTSTILL_GOLDEN=write uv run pytest tests/test_docs.py writes it."""
    page = DOCS / "recipes.md"
    head, mark, _ = page.read_text().partition("<!-- from the schema -->\n")
    expected = f"{head}{mark}\n## Keys\n\n{keys_table()}\n## Metrics\n\n{table()}"
    if os.environ.get("POTSTILL_GOLDEN") == "write":
        page.write_text(expected)
    assert page.read_text() == expected


def test_the_defaults_of_the_table_are_those_of_a_plain_config():
    """What `jobs/train.py` runs with, where nothing is said."""
    written = dict(
        re.findall(r"^\| `([\w.<>]+)` .*? \| `([^`]*)` \| [^|]*\|$", keys_table(), re.MULTILINE)
    )
    for key, value in flatten(to_dict(compose("train", ["data.root=x"]))):
        if key == "data.root":
            continue
        key = re.sub(r"^task\.terms\.\w+", "task.terms.<term>", key)
        assert written[key] == _as_written(value), key


def test_every_page_that_is_linked_exists():
    for page in (ROOT / "README.md", *DOCS.glob("*.md")):
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
        assert Path(page).read_text().endswith("\n")


def test_every_loss_of_a_teacher_stands_on_its_page():
    from potstill.distil_losses import BATCH_SCOPE, LOSSES
    from potstill.term_weights import KEYS

    page = (DOCS / "distillation.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    for name in LOSSES:
        assert any(f"`{name}`" in row and ("arXiv:" in row or "doi:" in row) for row in rows), name
    for name in BATCH_SCOPE:
        assert f"`{name}`" in page.split("compare samples with each other")[0].splitlines()[-1], (
            name
        )
    for schedule in KEYS:
        assert schedule in page
