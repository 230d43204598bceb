"""The metrics of the figures, against slow references."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import helpers
from helpers import PHONEMES, boundary_distance, calibration, confusion_matrix

repeatable = settings(derandomize=True, deadline=None, database=None, max_examples=100)


@repeatable
@given(
    st.lists(st.tuples(st.integers(0, 41), st.integers(0, 41)), max_size=60),
    st.sampled_from(["uint8", "int32", "int64"]),
    st.sampled_from(["uint8", "int32", "int64"]),
)
def test_confusion_matrix(pairs, label_dtype, prediction_dtype):
    expected = [[0] * 42 for _ in range(42)]
    for label, prediction in pairs:
        expected[label][prediction] += 1
    labels, predictions = np.array(pairs, int).reshape(-1, 2).T
    matrix = confusion_matrix(labels.astype(label_dtype), predictions.astype(prediction_dtype))
    assert matrix.dtype == np.int64 and matrix.tolist() == expected
    matrix = confusion_matrix(torch.from_numpy(labels.copy()), torch.from_numpy(predictions.copy()))
    assert matrix.tolist() == expected and len(PHONEMES) == 42


@repeatable
@given(st.lists(st.tuples(st.integers(0, 39), st.integers(0, 39)), max_size=60))
def test_share_of_the_errors_within_a_manner_of_articulation(pairs):
    manner = {phoneme: name for name, group in helpers.MANNERS.items() for phoneme in group}
    assert sorted(manner) == sorted(PHONEMES[:40])
    wrong = [(true, predicted) for true, predicted in pairs if true != predicted]
    within = [pair for pair in wrong if manner[PHONEMES[pair[0]]] == manner[PHONEMES[pair[1]]]]
    matrix = confusion_matrix(*np.array(pairs, int).reshape(-1, 2).T)
    assert helpers.share_within_manners(matrix) == pytest.approx(len(within) / max(len(wrong), 1))


def slow_boundary_distance(utterances):
    distances = []
    for labels in utterances:
        boundaries = [
            0,
            *(t for t in range(1, len(labels)) if labels[t] != labels[t - 1]),
            len(labels),
        ]
        for t in range(len(labels)):
            distances.append(
                min(min(abs(t - boundary), abs(t + 1 - boundary)) for boundary in boundaries)
            )
    return distances


@repeatable
@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 3), st.integers(1, 9)), min_size=1, max_size=6),
        min_size=1,
        max_size=5,
    )
)
def test_boundary_distance(phones):
    utterances = [[label for label, length in runs for _ in range(length)] for runs in phones]
    offsets = [0, *itertools.accumulate(map(len, utterances))]
    labels = np.array([label for labels in utterances for label in labels], np.uint8)
    distances = boundary_distance(labels, offsets)
    assert distances.tolist() == slow_boundary_distance(utterances)
    assert (
        boundary_distance(torch.from_numpy(labels), torch.tensor(offsets)).tolist()
        == distances.tolist()
    )


def test_boundary_distance_by_hand():
    assert boundary_distance([1, 1, 1, 1, 1, 2, 2], [0, 7]).tolist() == [0, 1, 2, 1, 0, 0, 0]
    assert boundary_distance([1, 1, 1, 1, 1, 1], [0, 2, 6]).tolist() == [
        0,
        0,
        0,
        1,
        1,
        0,
    ]  # an utterance ends inside


def slow_calibration(confidences, correct, bins):
    rows, error = [], 0
    for i in range(bins):
        inside = [
            j
            for j, c in enumerate(confidences)
            if i / bins < c <= (i + 1) / bins or (c == 0 and i == 0)
        ]
        if inside:
            confidence = math.fsum(confidences[j] for j in inside) / len(inside)
            accuracy = sum(correct[j] for j in inside) / len(inside)
            error += abs(confidence - accuracy) * len(inside) / len(confidences)
        rows.append((confidence, accuracy, len(inside)) if inside else (np.nan, np.nan, 0))
    return *np.array(rows).T, error


@repeatable
@given(
    st.lists(
        st.tuples(
            st.one_of(
                st.integers(0, 999).map(lambda i: (i + 0.5) / 1000), st.sampled_from([0, 0.5, 1])
            ),
            st.booleans(),
        ),
        min_size=1,
        max_size=80,
    ),
    st.sampled_from([1, 2, 10]),
)
def test_calibration(answers, bins):
    confidences, correct = (list(column) for column in zip(*answers))
    result = calibration(np.array(confidences), np.array(correct), bins)
    for got, expected in zip(result, slow_calibration(confidences, correct, bins)):
        np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-12)
    for got, expected in zip(
        calibration(np.array(confidences, np.float32), np.array(correct), bins), result
    ):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_calibration_by_hand():
    confidence, accuracy, count, error = calibration(
        [0.95, 0.95, 0.55, 0.55], [True, True, True, False]
    )
    assert (
        count.tolist() == [0, 0, 0, 0, 0, 2, 0, 0, 0, 2]
        and np.isnan(confidence[0])
        and np.isnan(accuracy[0])
    )
    assert (confidence[9], accuracy[9], confidence[5], accuracy[5]) == (0.95, 1, 0.55, 0.5)
    assert error == pytest.approx(0.05)


def test_the_tables_of_a_confusion_matrix():
    confusion = np.zeros((42, 42), int)
    confusion[1, [1, 2]], confusion[2, [2, 1, 3]], confusion[7, 7] = (6, 2), (1, 5, 4), 9
    table = helpers.accuracy_by_phoneme(confusion)
    assert table.to_dict("list") == {
        "phoneme": ["B", "AA", "AE"],
        "frames": [9, 8, 10],
        "accuracy": [1, 0.75, 0.1],
    }
    table = helpers.top_confusions(confusion, 2)
    assert table.to_dict("list") == {
        "true": ["AE", "AE"],
        "taken for": ["AA", "AH"],
        "frames": [5, 4],
        "% of its frames": [50, 40],
        "% of all errors": [pytest.approx(500 / 11), pytest.approx(400 / 11)],
    }
    assert (helpers.top_confusions(np.diag(confusion.diagonal()))["% of all errors"] == 0).all()


def test_each_phoneme_of_a_frame_has_one_manner_of_articulation():
    assert sorted(sum(helpers.MANNERS.values(), [])) == sorted(PHONEMES[:40])
