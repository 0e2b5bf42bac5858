"""The walls of the house, read from the imports."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "platform" / "potstill"
MODULES = sorted(p for p in SOURCE.rglob("*.py") if p.name != "__init__.py")

RAY = {
    "data/prepare.py",
    "fit.py",
    "cluster.py",
    "handover.py",
    "soft_labels.py",
    "search.py",
    "search_tune.py",
    "doctor.py",
    "doctor_cluster.py",
    "doctor_machine.py",
    "monitor_ray.py",
}
AIM = {
    "tracking.py",
    "aim_health.py",
    "explore_index.py",
    "explore_queries.py",
    "explore_serve.py",
}
# a module may import only what stands in its line (besides errors, config, runs and console)
ALLOWED = {
    "losses": set(),
    "distil_losses": {"losses"},
    "term_weights": set(),
    "task": {"losses", "distil_losses", "term_weights"},
    "metrics": {"losses"},
    "optim": set(),
    "watch": set(),
    "averaging": set(),
    "memory": set(),
    "loop": {"task", "term_weights", "metrics", "optim", "averaging", "memory", "watch", "data"},
    "models": {"models"},
    "data": {"data", "cluster", "handover", "replica"},
    "explore_guard": set(),
    "explore_queries": set(),
    "explore_child": set(),
}
BELOW_ALL = {
    "control_groups",
    "errors",
    "config",
    "runs",
    "console",
    "registry",
    "metric_names",
    "predictions",
    "storage",
}


def imported(path: Path) -> list[tuple[str, bool]]:
    """(dotted name, at module level) of every import."""
    tree = ast.parse(path.read_text())
    top = {id(n) for n in tree.body}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(a.name, id(node) in top) for a in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = (
                [f"{node.module}.{a.name}" for a in node.names]
                if node.module == "potstill"
                else [node.module]
            )
            found += [(name, id(node) in top) for name in names]
    return found


def name_of(path: Path) -> str:
    return path.relative_to(SOURCE).as_posix()


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_walls(path: Path):
    name = name_of(path)
    packages = {(i.split(".")[0], top) for i, top in imported(path)}
    if name not in RAY:
        assert not any(p == "ray" for p, _ in packages), "ray stays in its modules"
    if name != "config.py":
        assert not any(p in ("hydra", "omegaconf") for p, _ in packages), (
            "config.py alone knows Hydra"
        )
    if name not in AIM:
        assert not any(p == "aim" for p, _ in packages), "Aim stays in its modules"
    assert ("aim", True) not in packages, "a host without Aim still trains"
    part = name.split("/")[0].removesuffix(".py")
    if part in ALLOWED:
        ours = {i.split(".")[1] for i, _ in imported(path) if i.startswith("potstill.")}
        assert ours <= ALLOWED[part] | BELOW_ALL


@pytest.mark.parametrize(
    "name",
    sorted(
        BELOW_ALL
        | {"fit", "cluster", "quickstart", "gate", "distil", "term_weights", "soft_labels"}
    ),
)
def test_what_checks_a_users_mistake_does_not_wait_for_torch(name: str):
    slow = {"torch", "timm", "ray", "torchmetrics", "matplotlib", "aim", "pandas", "sklearn"}
    assert not {i.split(".")[0] for i, top in imported(SOURCE / f"{name}.py") if top} & slow


def test_platform_is_no_package():
    assert not (ROOT / "platform" / "__init__.py").exists()


def test_a_job_is_a_dozen_lines():
    for path in (ROOT / "jobs").glob("*.py"):
        main = next(
            n
            for n in ast.parse(path.read_text()).body
            if isinstance(n, ast.FunctionDef) and n.name == "main"
        )
        assert main.end_lineno is not None
        assert main.end_lineno - main.lineno <= 20, (
            f"{path.name}: a job composes, calls one function, prints"
        )
