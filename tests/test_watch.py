import numpy as np

from potstill.watch import check_epoch, check_labels

CLASSES = ["ash", "elm", "oak", "yew"]
LABELS = np.arange(200) % 4


def epoch(train_loss=1.0, train_top1=60.0, val_loss=1.0, val_top1=60.0):
    return {
        "train_loss": train_loss,
        "train_top1_acc": train_top1,
        "val_loss": val_loss,
        "val_top1_acc": val_top1,
    }


def names(epochs, predictions=LABELS, labels=LABELS):
    return [w["name"] for w in check_epoch(epochs, labels, predictions, CLASSES)]


def test_healthy_training_is_left_alone():
    assert names([epoch(1.4, 25.0, 1.4, 26.0)]) == []
    assert names([epoch(1.4, 25.0, 1.4, 26.0), epoch(1.0, 60.0, 1.1, 55.0)]) == []


def test_predictions_of_one_class_are_a_collapse():
    found = check_epoch([epoch()], LABELS, np.full(200, 2), CLASSES)
    assert [w["name"] for w in found] == ["collapsed"]
    assert "'oak'" in found[0]["message"]
    assert (
        names([epoch()], np.full(200, 2), np.full(200, 2)) == []
    )  # there is nothing else to predict


def test_validation_at_chance_while_training_learns():
    learning = [epoch(1.4, 25.0, 1.39, 25.0), epoch(0.7, 80.0, 1.5, 26.0)]
    assert names(learning) == ["val_at_chance"]
    # both stand still: nothing is learned yet, and that is another matter
    assert names([epoch(1.4, 25.0, 1.39, 25.0), epoch(1.39, 26.0, 1.40, 25.0)]) == []


def test_the_case_that_nobody_noticed():
    # validation at 9.5393 and 0 % in every epoch, while training went from 9.16 to 7.54
    history = [epoch(9.1621, 0.0, 9.5393, 0.0), epoch(7.54, 3.0, 9.5393, 0.0)]
    assert names(history) == ["val_at_chance", "val_loss_frozen"]


def test_six_digits_decide_that_a_loss_stands_still():
    assert names([epoch(val_loss=1.0000001), epoch(val_loss=1.0)]) == ["val_loss_frozen"]
    assert names([epoch(val_loss=1.00001), epoch(val_loss=1.0)]) == []


def test_labels_of_one_split_only():
    counts = {"train": np.array([5, 5, 5, 0]), "val": np.array([2, 0, 2, 2])}
    found = check_labels(counts, CLASSES)
    assert [w["name"] for w in found] == ["label_sets_differ"] * 2
    assert "in train and none in val: elm" in found[0]["message"]
    assert "in val and none in train: yew" in found[1]["message"]
    assert check_labels({"train": np.ones(4), "val": np.ones(4)}, CLASSES) == []
