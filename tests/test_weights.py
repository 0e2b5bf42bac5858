import argparse
import json
import os
import pickle
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from potstill import runs
from potstill.errors import UserError
from potstill.models.images import TimmModel
from potstill.models.weights import (
    InitReport,
    init_from,
    load_run_state,
    load_weights,
)

LITE0 = Path(__file__).parents[2] / "shared" / "weights" / "tf_efficientnet_lite0.safetensors"
TREES = ["Quercus_alba", "Quercus_rubra", "Acer_rubrum", "Acer_saccharum", "Betula_lenta"]


def tiny(classes: int = 5, name: str = "test_resnet", **kwargs) -> TimmModel:
    return TimmModel(classes, name=name, **kwargs)


def raw_state(
    classes: int = 5, name: str = "test_resnet", seed: int = 1
) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return timm.create_model(name, num_classes=classes).state_dict()


def a_run(folder: Path, model: TimmModel, classes: list[str]) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("{}\n")
    runs.write_json(folder / "run.json", {"classes": classes})
    name = runs.checkpoint_name(3)
    best = {"folder": name, "step": 3, "epoch": 1, "metric": "val_top1_acc", "value": 1.0}
    runs.save_checkpoint(folder, 3, model.state_dict(), {}, {"best": best, "epoch_done": True})
    return folder


# ------------------------------------------------------------------------------------------ reading
@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt", ".bin"])
def test_every_kind_of_file_loads(tmp_path, suffix):
    state, path = raw_state(), tmp_path / f"w{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    loaded = load_weights(path)
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[k], v) for k, v in state.items())


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: {"state_dict": s, "epoch": 3},
        lambda s: {"model": {"state_dict": {f"module.{k}": v for k, v in s.items()}}},
        lambda s: {"model_state_dict": {f"module._orig_mod.{k}": v for k, v in s.items()}},
        lambda s: {f"model._orig_mod.net.{k}": v for k, v in s.items()},
        lambda s: {"state_dict_ema": s, "state_dict": {k: v * 0 for k, v in s.items()}},
        lambda s: {"state_dict": s, "args": argparse.Namespace(lr=0.1)},
    ],
    ids=["lightning", "nested", "compiled ddp", "a task", "averaged", "timm's script"],
)
def test_wrappers_and_prefixes_are_taken_off(tmp_path, wrap):
    state = raw_state()
    torch.save(wrap(state), tmp_path / "w.pth")
    loaded = load_weights(tmp_path / "w.pth")
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[k], v) for k, v in state.items())


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil-was-here",)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, monkeypatch, zipped):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "w.pth"
    torch.save(
        {"state_dict": raw_state(), "x": Evil()}, path, _use_new_zipfile_serialization=zipped
    )
    with pytest.raises(
        UserError, match=r"model\.init_from must hold tensors only.*wants to run code.*system"
    ):
        load_weights(path)
    for protocol, refusal in ((2, "wants to run code"), (4, "holds more than tensors")):
        path.write_bytes(pickle.dumps(Evil(), protocol))
        with pytest.raises(UserError, match=refusal):
            load_weights(path)
    torch.save(tiny(), path)
    with pytest.raises(UserError, match="wants to run code"):
        load_weights(path)
    assert not (tmp_path / "evil-was-here").exists()


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
@pytest.mark.parametrize("damage", ["empty", "truncated", "noise"])
def test_a_damaged_file_is_named(tmp_path, name, damage):
    path = tmp_path / name
    save_file(raw_state(), path) if name.endswith("s") else torch.save(raw_state(), path)
    content = path.read_bytes()
    path.write_bytes(
        {"empty": b"", "truncated": content[: len(content) // 2], "noise": b"\xff" * 999}[damage]
    )
    with pytest.raises(UserError, match=r"model\.init_from: .*not a readable .*fetch it again"):
        load_weights(path)


def test_what_is_no_weights_file_is_refused(tmp_path):
    with pytest.raises(
        UserError, match=r"model\.init_from must be .*gone\.pth, which does not exist"
    ):
        load_weights(tmp_path / "gone.pth")
    with pytest.raises(
        UserError, match=r"model\.init_from must be .*which is a folder but not a run"
    ):
        load_weights(tmp_path)
    (tmp_path / "w.h5").write_bytes(b"x")
    with pytest.raises(UserError, match=r"must end in \.safetensors, \.pth, \.pt or \.bin"):
        load_weights(tmp_path / "w.h5")
    torch.save({"epoch": 3}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="holds no tensors by name"):
        load_weights(tmp_path / "w.pth")


# ---------------------------------------------------------------------------------------- init_from
def test_a_runs_classes_are_taken_over_by_name(tmp_path):
    teacher = tiny()
    source = a_run(tmp_path / "teacher", teacher, TREES)
    wanted = ["Betula_lenta", "Fagus_grandifolia", "Quercus_alba"]
    model = tiny(3)
    report = init_from(model, source, wanted)
    assert (report.kept, report.new) == (["Betula_lenta", "Quercus_alba"], ["Fagus_grandifolia"])
    assert report.dropped == ["Quercus_rubra", "Acer_rubrum", "Acer_saccharum"]
    for tensor in ("weight", "bias"):
        ours, theirs = getattr(model.net.fc, tensor), getattr(teacher.net.fc, tensor)
        assert torch.equal(ours[[0, 2]], theirs[[4, 0]])
    assert not model.net.fc.weight[1].any(), "a new class starts from zero"
    head = set(model.head_parameter_names())
    theirs = teacher.state_dict()
    assert all(torch.equal(v, theirs[k]) for k, v in model.state_dict().items() if k not in head)
    assert report.missing == report.unexpected == report.mismatched == []
    assert len(report.loaded) == len(theirs)
    assert "classes: kept 2, dropped 3, new 1" in report.lines()


def test_a_run_into_the_same_classes_in_another_order_predicts_the_same(tmp_path):
    teacher = tiny().eval()
    source = a_run(tmp_path / "teacher", teacher, TREES)
    model = tiny().eval()
    init_from(model, source, TREES[::-1])
    batch = {"image": torch.rand(2, 3, 64, 64)}
    with torch.no_grad():
        torch.testing.assert_close(model(batch)["logits"], teacher(batch)["logits"].flip(1))


def test_a_file_without_class_names_gives_its_backbone_only(tmp_path):
    state = raw_state()
    torch.save(state, tmp_path / "w.pth")
    model = tiny()  # as many classes, but who knows which
    report = init_from(model, tmp_path / "w.pth", TREES)
    assert not model.net.fc.weight.any()
    assert torch.equal(model.net.conv1[0].weight, state["conv1.0.weight"])
    assert (report.kept, report.new, report.unnamed) == ([], TREES, 5)
    assert "classes: kept 0, dropped 5 (the file names none), new 5" in str(report)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_file_may_name_its_classes(tmp_path, suffix):
    state, path = raw_state(), tmp_path / f"w{suffix}"
    if suffix == ".pth":
        torch.save({"state_dict": state, "classes": TREES}, path)
    else:
        save_file(state, path, metadata={"classes": json.dumps(TREES)})
    model = tiny(1)
    report = init_from(model, path, ["Acer_rubrum"])
    assert torch.equal(model.net.fc.weight[0], state["fc.weight"][2])
    assert (len(report.kept), len(report.dropped), len(report.new)) == (1, 4, 0)


def test_a_file_whose_names_do_not_fit_its_head_is_refused(tmp_path):
    torch.save({"state_dict": raw_state(), "classes": TREES[:4]}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="names 4 classes, but its classifier has 5 rows"):
        init_from(tiny(), tmp_path / "w.pth", TREES)


def test_another_architecture_is_refused_with_names_and_nothing_is_changed(tmp_path):
    torch.save(raw_state(name="test_efficientnet"), tmp_path / "w.pth")
    model = tiny()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(
        UserError,
        match=r"model\.name=test_resnet, got .*w\.pth, in which 1 of \d+ .*missing: conv1.*unexpected: blocks",
    ):
        init_from(model, tmp_path / "w.pth", TREES)
    torch.save(raw_state(), tmp_path / "w.pth")
    state = torch.load(tmp_path / "w.pth")
    state["layer1.0.conv1.weight"] = torch.zeros(1, 2, 3, 3)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(
        UserError, match=r"shapes differ: layer1\.0\.conv1\.weight \[1, 2, 3, 3\] for \["
    ):
        init_from(model, tmp_path / "w.pth", TREES)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"model\.init_from must be the folder of a run"):
        init_from(tiny(), tmp_path, TREES)


def test_missing_and_unexpected_tensors_are_named(tmp_path):
    state = raw_state()
    del state["bn1.weight"]
    torch.save({**state, "extra.weight": torch.zeros(1)}, tmp_path / "w.pth")
    report = init_from(tiny(), tmp_path / "w.pth", TREES)
    assert (report.missing, report.unexpected) == (["bn1.weight"], ["extra.weight"])
    assert {"  missing: bn1.weight", "  unexpected: extra.weight"} <= set(report.lines())


def test_the_report_shows_ten_names():
    names = [f"c{i:02}" for i in range(61)]
    report = InitReport("w", [], names, [], 0, [], [], [], [])
    assert report.lines()[1] == "classes: kept 0, dropped 61, new 0"
    assert report.lines()[2] == f"  dropped: {', '.join(names[:10])} and 51 more"


@pytest.mark.skipif(not LITE0.exists(), reason="no ../shared/weights")
def test_real_imagenet_weights_load():
    model = TimmModel(12, name="tf_efficientnet_lite0", image_px=128)
    report = init_from(model, LITE0, [f"species {i}" for i in range(12)])
    assert (report.missing, report.unexpected, report.unnamed) == ([], [], 1000)
    assert len(report.loaded) == len(model.state_dict()) - 2
    state = load_weights(LITE0)
    assert torch.equal(model.net.conv_stem.weight, state["conv_stem.weight"])
    full = TimmModel(1000, name="tf_efficientnet_lite0", image_px=64)
    full.net.load_state_dict(state, strict=True)


# --------------------------------------------------------------------------------------------- runs
def test_a_run_loads_to_the_last_tensor(tmp_path):
    source = tiny()
    run_dir = a_run(tmp_path / "run", source, TREES)
    model = tiny()
    for which in ("best", "last"):
        load_run_state(model, run_dir, which)
    assert all(torch.equal(v, source.state_dict()[k]) for k, v in model.state_dict().items())
    with pytest.raises(
        UserError,
        match=r"must fit the model that .*config\.yaml.* 2 tensors .*fc\.bias \[5\] for \[4\]",
    ):
        load_run_state(tiny(4), run_dir)
    with pytest.raises(UserError, match="checkpoint must be best or last, got 'newest'"):
        load_run_state(model, run_dir, "newest")
