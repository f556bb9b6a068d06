"""Measures of an evaluation equal those of scikit-learn, pycocotools, rouge-score and sacrebleu, resampled or not."""

import contextlib
import io
import logging
from itertools import chain

import numpy as np
import pytest

pytest.importorskip("sklearn")

import sacrebleu
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from rouge_score.rouge_scorer import RougeScorer
from sklearn import metrics
from sklearn.calibration import calibration_curve

from cxr_triton.errors import InvalidRequest
from cxr_triton.evaluate import boxes, measures, text
from cxr_triton.evaluate.boxes import Placed
from cxr_triton.evaluate.intervals import Resamples, interval
from cxr_triton.evaluate.measures import LabelSets

NAN = float("nan")
ROWS, LABELS = 240, 6


def drawn(seed: int, *, unknown: float = 0.0) -> tuple[LabelSets, np.ndarray]:
    """Sets and patients, who may have several rows; label 4 is in no truth, label 5 in none and never said."""
    random = np.random.default_rng(seed)
    truth = random.random((ROWS, LABELS)) < [0.5, 0.3, 0.1, 0.05, 0.0, 0.0]
    said = truth ^ (random.random((ROWS, LABELS)) < 0.2)
    said[:, 5] = False
    known = random.random((ROWS, LABELS)) >= unknown
    answered = np.repeat(random.random((ROWS, 1)) > 0.1, LABELS, axis=1)
    return LabelSets(truth, said & answered, known, answered), random.integers(0, 150, ROWS)


def repeated(resamples: Resamples, column: int) -> np.ndarray:
    """Row numbers of one resample, as often as it holds them: what scikit-learn is given."""
    rows = np.arange(resamples.rows)
    part = next(w[:, column - p.start] for p, w in resamples.weights(rows) if p.start <= column < p.stop)
    return np.repeat(rows, part)


@pytest.mark.parametrize("column", [0, 1, 7])
@pytest.mark.parametrize("seed", range(5))
def test_labels_are_counted_as_by_scikit_learn(seed, column):
    sets, patients = drawn(seed)
    resamples = Resamples(patients, count=7, seed=seed)
    rows = repeated(resamples, column)
    truth, said = sets.truth[rows], sets.said[rows]
    counts = measures.counted(sets, resamples)
    each, mean = measures.per_label(counts), measures.averages(counts)
    for name in ("precision", "recall", "f1"):
        score = getattr(metrics, f"{name}_score")
        expected = score(truth, said, average=None, zero_division=NAN)
        np.testing.assert_allclose(each[name][column], expected, rtol=1e-12)
        for average in ("macro", "micro", "weighted"):
            expected = score(truth, said, average=average, zero_division=NAN)
            np.testing.assert_allclose(mean[f"{name}_{average}"][column], expected, rtol=1e-12)
    expected = metrics.recall_score(~truth, ~said, average=None, zero_division=NAN)
    np.testing.assert_allclose(each["specificity"][column], expected, rtol=1e-12)
    assert np.isnan(each["f1"][column][5]) and each["f1"][column][4] == 0
    np.testing.assert_allclose(each["prevalence"][column], truth.mean(axis=0))
    confusion = metrics.multilabel_confusion_matrix(truth, said)
    assert (
        np.stack([counts[name][column] for name in ("tn", "fp", "fn", "tp")], axis=1) == confusion.reshape(-1, 4)
    ).all()


def test_a_label_of_unknown_truth_counts_nowhere():
    sets, patients = drawn(1, unknown=0.4)
    found = measures.per_label(measures.counted(sets, Resamples(patients, count=0)))
    for label in range(LABELS):
        known = sets.known[:, label]
        expected = metrics.f1_score(sets.truth[known, label], sets.said[known, label], zero_division=NAN)
        np.testing.assert_allclose(found["f1"][0, label], expected)
    silent = LabelSets(sets.truth, sets.said, sets.known, sets.answered & (np.arange(LABELS) != 2))
    half = measures.set_measures(silent)
    rows = sets.known[:, 2]
    assert not half["exact_match"][rows].any() and (half["label_iou"][rows] < 1).all()
    np.testing.assert_array_equal(half["exact_match"][~rows], measures.set_measures(sets)["exact_match"][~rows])
    turned = LabelSets(sets.truth ^ ~sets.known, sets.said ^ ~sets.known, sets.known, sets.answered)
    for name, values in measures.set_measures(turned).items():
        np.testing.assert_array_equal(values, measures.set_measures(sets)[name])


def test_sets_are_compared_as_by_scikit_learn_and_what_is_no_answer_is_wrong():
    sets, _ = drawn(3)
    found, rows = measures.set_measures(sets), sets.answered.all(axis=1)
    assert found["exact_match"][rows].mean() == metrics.accuracy_score(sets.truth[rows], sets.said[rows])
    expected = metrics.jaccard_score(sets.truth[rows], sets.said[rows], average="samples", zero_division=1.0)
    np.testing.assert_allclose(found["label_iou"][rows].mean(), expected)
    nothing = ~rows & ~sets.truth.any(axis=1)
    assert nothing.any() and not found["exact_match"][~rows].any() and not found["label_iou"][~rows].any()


@pytest.mark.parametrize("column", [0, 1, 5])
@pytest.mark.parametrize("levels", [3, 20, 10**9])
@pytest.mark.parametrize("prevalence", [0.03, 0.5])
def test_scores_rank_as_by_scikit_learn_with_ties(levels, prevalence, column):
    random = np.random.default_rng(levels)
    truth = random.random(ROWS) < prevalence
    scores = np.round((random.random(ROWS) + 0.4 * truth) / 1.4 * levels) / levels
    resamples = Resamples(random.integers(0, 90, ROWS), count=40)
    chosen = np.flatnonzero(random.random(ROWS) < 0.8)
    found = measures.ranking(truth[chosen], scores[chosen], chosen, resamples)
    rows = repeated(resamples, column)
    rows = rows[np.isin(rows, chosen)]
    np.testing.assert_allclose(found["auroc"][column], metrics.roc_auc_score(truth[rows], scores[rows]), rtol=1e-12)
    expected = metrics.average_precision_score(truth[rows], scores[rows])
    np.testing.assert_allclose(found["average_precision"][column], expected, rtol=1e-12)


@pytest.mark.parametrize("truth", [np.zeros(30, bool), np.ones(30, bool)])
def test_one_class_alone_has_no_ranking(truth):
    scores, rows = np.linspace(0, 1, 30), np.arange(30)
    found = measures.ranking(truth, scores, rows, Resamples(rows, count=3))
    assert np.isnan(found["auroc"]).all() and np.isnan(found["average_precision"]).all()
    assert measures.curves(truth, scores) is None


@pytest.mark.parametrize("column", [0, 2])
def test_calibration_is_scikit_learns(column):
    random = np.random.default_rng(5)
    scores = random.random(ROWS) ** 2
    scores[:6] = [0, 1, 0.1, 0.2, 0.3, 0.7]  # on the edges of bins
    truth = random.random(ROWS) < scores**0.7
    resamples = Resamples(random.integers(0, 120, ROWS), count=2)
    found = measures.reliability(truth, scores, np.arange(ROWS), resamples)
    rows = repeated(resamples, column)
    np.testing.assert_allclose(found["brier"][column], metrics.brier_score_loss(truth[rows], scores[rows]))
    observed, score = calibration_curve(truth[rows], scores[rows], n_bins=measures.BINS)
    np.testing.assert_allclose([b["observed"][column] for b in found["bins"]], observed)
    places = np.searchsorted(np.linspace(0, 1, measures.BINS + 1)[1:-1], scores[rows])
    sizes = np.bincount(places, minlength=measures.BINS)
    np.testing.assert_allclose(found["ece"][column], np.abs(observed - score) @ sizes / len(rows))
    if column == 0:
        np.testing.assert_allclose([b["score"] for b in found["bins"]], score)
        assert [b["count"] for b in found["bins"]] == sizes.tolist()


def test_curves_are_scikit_learns_and_of_few_points():
    random = np.random.default_rng(6)
    truth = random.random(3000) < 0.3
    scores = random.random(3000) + truth * 0.5
    found = measures.curves(truth, scores)
    alarms, hits, _ = metrics.roc_curve(truth, scores)
    assert len(found["roc"]) <= measures.CURVE_POINTS and found["roc"][0] == [0, 0] and found["roc"][-1] == [1, 1]
    assert abs(metrics.auc(*np.array(found["roc"]).T) - metrics.auc(alarms, hits)) < 0.005
    precision, recall, _ = metrics.precision_recall_curve(truth, scores)
    points = {(round(r, 5), round(p, 5)) for r, p in zip(recall, precision, strict=True)}
    assert {tuple(point) for point in found["precision_recall"]} <= points


def test_what_is_said_in_a_labels_place_is_counted():
    truth = np.array([[1, 0, 0], [1, 0, 0], [0, 1, 0], [1, 1, 0]], bool)
    said = np.array([[0, 1, 0], [0, 1, 1], [0, 1, 0], [1, 0, 1]], bool)
    sets = LabelSets(truth, said, np.ones_like(truth), np.ones_like(truth))
    assert measures.confusion(sets).tolist() == [[1, 2, 1], [0, 1, 1], [0, 0, 0]]
    one = np.eye(4, dtype=bool)[np.random.default_rng(0).integers(0, 4, (2, 50))]
    sets = LabelSets(one[0], one[1], np.ones_like(one[0]), np.ones_like(one[0]))  # of one label each, the usual matrix
    assert (measures.confusion(sets) == metrics.confusion_matrix(*one.argmax(axis=2))).all()


def scattered(seed: int, *, ties: bool = False) -> tuple[list, list]:
    """True boxes of three labels, and ones that were said near them or anywhere."""
    random = np.random.default_rng(seed)

    def box(label, near=None):
        corner, size = random.uniform(0, 60, 2), random.uniform(8, 40, 2)
        low = corner if near is None else np.array(near.corners[:2]) + random.normal(0, 5, 2)
        high = low + size if near is None else np.array(near.corners[2:]) + random.normal(0, 5, 2)
        score = round(random.random(), 1) if ties else float(random.random())
        return Placed(label, tuple(map(float, (*low, *np.maximum(high, low + 1)))), score)

    truth, said = [], []
    for _ in range(60):
        true = [box("abc"[random.integers(3)]) for _ in range(random.integers(0, 4))]
        near = [box(each.label, each) for each in true for _ in range(random.integers(0, 3))]
        truth.append(true)
        said.append([*near, *(box("abc"[random.integers(3)]) for _ in range(random.integers(0, 2)))])
    return truth, said


def coco(truth: list, said: list, threshold: float) -> dict[str, float]:
    """Average precision of each label by pycocotools, of rows that may be repeated."""

    def entry(image, placed):
        x1, y1, x2, y2 = placed.corners
        width, height = x2 - x1, y2 - y1
        facts = {"image_id": image, "category_id": "abc".index(placed.label) + 1, "bbox": [x1, y1, width, height]}
        return facts | {"area": width * height, "iscrowd": 0, "score": placed.score}

    right = COCO()
    right.dataset = {
        "images": [{"id": i} for i in range(len(truth))],
        "categories": [{"id": i + 1, "name": name} for i, name in enumerate("abc")],
        "annotations": [entry(i, box) | {"id": 0} for i, boxes_ in enumerate(truth) for box in boxes_],
    }
    for number, annotation in enumerate(right.dataset["annotations"], 1):
        annotation["id"] = number
    with contextlib.redirect_stdout(io.StringIO()):
        right.createIndex()
        guessed = right.loadRes([entry(i, box) for i, boxes_ in enumerate(said) for box in boxes_])
        judged = COCOeval(right, guessed, "bbox")
        judged.params.iouThrs = np.array([threshold])
        judged.evaluate()
        judged.accumulate()
    return {name: float(judged.eval["precision"][0, :, i, 0, -1].mean()) for i, name in enumerate("abc")}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("threshold", boxes.THRESHOLDS)
def test_average_precision_of_boxes_is_pycocotools(threshold, seed):
    truth, said = scattered(seed)
    resamples = Resamples(np.random.default_rng(seed).integers(0, 40, len(truth)), count=3)
    found = boxes.hits(truth, said, threshold)
    expected = coco(truth, said, threshold)
    for label in "abc":
        ours = boxes.average_precision(label, truth, said, found, resamples)
        assert ours[0] == pytest.approx(expected[label], abs=1e-9)
    counts = boxes.counted(truth, said, found, resamples)
    hit, placed, true = (sum(map(len, each)) for each in ([[h for h in row if h] for row in found], said, truth))
    assert (counts["precision"][0], counts["recall"][0]) == (hit / placed, hit / true)
    assert counts["f1"][0] == pytest.approx(2 * hit / (placed + true))


def test_boxes_of_one_score_count_together_in_whatever_order_the_images_stand():
    truth, said = scattered(4, ties=True)
    values = []
    for rows in (slice(None), slice(None, None, -1)):
        found = boxes.hits(truth[rows], said[rows], 0.5)
        one = Resamples(range(len(truth)), count=0)
        values.append([boxes.average_precision(label, truth[rows], said[rows], found, one)[0] for label in "abc"])
    assert values[0] == pytest.approx(values[1], abs=1e-12)


def test_boxes_without_a_score_make_one_point():
    truth, said = scattered(4)
    without = [[box._replace(score=None) for box in placed] for placed in said]
    found = boxes.hits(truth, without, 0.3)
    boxes_and_hits = zip(chain(*without), chain(*found), strict=True)
    hit = sum(is_hit for box, is_hit in boxes_and_hits if box.label == "a")
    placed, true = (sum(box.label == "a" for box in chain(*each)) for each in (without, truth))
    up_to = (np.linspace(0, 1, 101) <= hit / true).mean()
    value = boxes.average_precision("a", truth, without, found, Resamples(range(len(truth)), count=0))[0]
    assert 0 < hit < placed and value == pytest.approx(hit / placed * up_to)


def test_a_resample_of_boxes_is_the_measure_of_its_rows():
    truth, said = scattered(5)
    resamples = Resamples(np.random.default_rng(5).integers(0, 30, len(truth)), count=5)
    found = boxes.hits(truth, said, 0.5)
    values = boxes.average_precision("b", truth, said, found, resamples)
    for column in range(1, 6):
        chosen = [(truth[row], said[row], found[row]) for row in repeated(resamples, column)]
        once = boxes.average_precision(
            "b", *map(list, zip(*chosen, strict=True)), Resamples(range(len(chosen)), count=0)
        )
        assert values[column] == pytest.approx(once[0], abs=1e-12)


def test_overlap_pairs_boxes_at_best_and_counts_those_alone_as_nothing():
    whole, half = Placed("a", (0, 0, 10, 10)), Placed("a", (0, 0, 10, 5))
    other = Placed("b", (0, 0, 10, 10))
    truth = [[whole], [whole], [whole, half], [whole], [], []]
    said = [[whole], [half], [half, whole], [other], [whole], []]
    np.testing.assert_allclose(boxes.overlaps(truth, said), [1, 0.5, 1, 0, 0, NAN])


WORDS = ("the", "heart", "is", "large", "no", "effusion", "seen", "left", "right", "lung", "clear", "base")


def spoken(seed: int) -> tuple[list[str], list[str]]:
    random = np.random.default_rng(seed)
    truth = [" ".join(random.choice(WORDS, random.integers(3, 30))) for _ in range(40)]
    said = [" ".join(word for word in each.split() if random.random() < 0.8) for each in truth]
    return ["", *said[1:]], truth


def test_report_text_is_scored_as_by_rouge_score_and_sacrebleu(caplog):
    said, truth = spoken(0)
    scorer = RougeScorer(["rougeL"])
    expected = [scorer.score(true, each)["rougeL"].fmeasure for each, true in zip(said, truth, strict=True)]
    np.testing.assert_allclose(text.rouge_l(said, truth), expected)
    resamples = Resamples(np.random.default_rng(0).integers(0, 30, 50), count=3)
    rows = np.arange(5, 45)
    found = text.bleu(said, truth, resamples, rows)
    for column in range(4):
        chosen = [row - 5 for row in repeated(resamples, column) if 5 <= row < 45]
        expected = sacrebleu.corpus_bleu([said[i] for i in chosen], [[truth[i] for i in chosen]]).score
        assert 100 * found[column] == pytest.approx(expected, rel=1e-9)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_report_metric_of_another_package_is_plugged_in(tmp_path, monkeypatch):
    info = tmp_path / "own-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Name: own\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[{text.GROUP}]\nlength = own_metric:length\n")
    (tmp_path / "own_metric.py").write_text("def length(said, truth):\n    return [len(each) for each in said]\n")
    monkeypatch.syspath_prepend(tmp_path)
    metric = text.plugged()["length"]
    assert text.scored("length", metric, ["a", "bcd"], ["x", "y"]).tolist() == [1, 3]
    for wrong in (lambda said, truth: [1.0], lambda said, truth: [NAN, 1], lambda said, truth: 0.5):
        with pytest.raises(InvalidRequest, match=r"'own'.*one number for each"):
            text.scored("own", wrong, ["a", "b"], ["x", "y"])
    (info / "entry_points.txt").write_text(f"[{text.GROUP}]\nlength = own_metric:missing\n")
    with pytest.raises(InvalidRequest, match=r"'length'.*cannot be loaded: AttributeError"):
        text.plugged()


def test_an_interval_says_nothing_where_too_many_resamples_say_nothing():
    values = np.r_[0.5, np.linspace(0.4, 0.6, 100)]
    found = interval(values)
    assert found["value"] == 0.5 and found["low"] == pytest.approx(0.405) and found["high"] == pytest.approx(0.595)
    values[1:5] = NAN
    assert interval(values)["low"] is not None
    values[1:8] = NAN
    assert interval(values) == {"value": 0.5, "low": None, "high": None}
    assert interval(np.full(5, NAN)) == {"value": None, "low": None, "high": None}
    assert interval(np.array([0.5])) == {"value": 0.5, "low": None, "high": None}


def test_all_right_is_not_called_certain():
    from scipy.stats import beta

    found = interval(np.ones(101), lambda: 20)
    assert found["high"] == 1 and found["low"] == pytest.approx(beta.ppf(0.025, 20, 1))
    found = interval(np.zeros(101), lambda: 20)
    assert found["low"] == 0 and found["high"] == pytest.approx(beta.ppf(0.975, 1, 20))


def test_images_of_one_patient_are_drawn_together():
    patients = ["p", "q", "p", "r"]
    resamples = Resamples(patients, count=200)
    (_, weights), *_ = resamples.weights(np.arange(4))
    assert (weights[0] == weights[2]).all() and (weights[:, 0] == 1).all() and resamples.patients == 3
    assert set(map(tuple, (weights[[0, 1, 3]].T))) > {(1, 1, 1)} and (weights[[0, 1, 3]].sum(axis=0) == 3).all()
    assert resamples.patients_of(np.array([True, False, True, False])) == 1
