import numpy as np

from potstill.predictions import Predictions, binary_predictions, multi_label_predictions
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


def said(predictions=LABELS, labels=LABELS):
    n = len(labels)
    return Predictions(np.arange(n), labels, predictions, np.ones(n, np.float32))


def names(epochs, predictions=LABELS, labels=LABELS):
    return [w["name"] for w in check_epoch(epochs, said(predictions, labels), CLASSES)]


def test_healthy_training_is_left_alone():
    assert names([epoch(1.4, 25.0, 1.4, 26.0)]) == []
    assert names([epoch(1.4, 25.0, 1.4, 26.0), epoch(1.0, 60.0, 1.1, 55.0)]) == []


def test_predictions_of_one_class_are_a_collapse():
    found = check_epoch([epoch()], said(np.full(200, 2)), CLASSES)
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


def several(scores, threshold=0.5):
    """Predictions of three classes, of which the first is in 60 % of 100 samples, the others in 30 %."""
    rng = np.random.default_rng(0)
    targets = rng.random((100, 3)) < (0.6, 0.3, 0.3)
    scores = scores(targets, rng)
    best = scores.argmax(1)
    return multi_label_predictions(np.arange(100), targets, scores, best, scores.max(1), threshold)


def test_several_labels_collapse_in_two_ways():
    healthy = several(lambda t, rng: 0.8 * t + 0.2 * rng.random(t.shape))
    assert check_epoch([epoch()], healthy, CLASSES) == []
    same = several(lambda t, rng: np.tile([0.9, 0.4, 0.6], (100, 1)))
    (found,) = check_epoch([epoch()], same, CLASSES)
    assert found["name"] == "collapsed"
    assert "100.0% of the validation samples is 'ash'" in found["message"]
    timid = several(lambda t, rng: 0.3 * t + 0.1 * rng.random(t.shape))
    (found,) = check_epoch([epoch()], timid, CLASSES)
    assert found["name"] == "collapsed"
    assert (
        "reaches its threshold (task.threshold); the largest probability is 0." in found["message"]
    )
    # the same probabilities, with a threshold that suits them
    better = several(lambda t, rng: 0.3 * t + 0.1 * rng.random(t.shape), "max_f1")
    assert check_epoch([epoch()], better, CLASSES) == []


def test_several_labels_at_chance():
    """Always naming the commonest class hits in most of the samples that have any class."""
    found = several(lambda t, rng: rng.random(t.shape))
    chance = 100 * found.targets[:, 0].sum() / found.targets.any(1).sum()
    learning = [epoch(1.0, 50.0, 1.0, 50.0), epoch(0.5, 95.0, 1.1, chance)]
    (warning,) = check_epoch(learning, found, CLASSES)
    assert warning["name"] == "val_at_chance"
    learning[-1]["val_top1_acc"] = 95.0
    assert check_epoch(learning, found, CLASSES) == []


def test_two_classes_are_at_chance_by_their_scores():
    """Where one class is rare, accuracy stays that of always saying the other, however good the scores are."""
    rng = np.random.default_rng(1)
    label = (np.arange(1000) < 100).astype(int)
    learning = [epoch(0.6, 90.0, 0.6, 90.0), epoch(0.3, 95.0, 0.7, 90.0)]
    blind = binary_predictions(np.arange(1000), label, rng.random(1000), 0.5)
    (warning,) = check_epoch(learning, blind, CLASSES[:2])
    assert warning["name"] == "val_at_chance"
    assert "validation AUC is 0.5" in warning["message"] or "is 0.4" in warning["message"]
    score = 0.3 * rng.random(1000) + 0.3 * label
    seeing = binary_predictions(np.arange(1000), label, score, 0.45)
    assert check_epoch(learning, seeing, CLASSES[:2]) == []


def test_labels_of_one_split_only():
    counts = {"train": np.array([5, 5, 5, 0]), "val": np.array([2, 0, 2, 2])}
    found = check_labels(counts, CLASSES)
    assert [w["name"] for w in found] == ["label_sets_differ"] * 2
    assert "in train and none in val: elm" in found[0]["message"]
    assert "in val and none in train: yew" in found[1]["message"]
    assert check_labels({"train": np.ones(4), "val": np.ones(4)}, CLASSES) == []
