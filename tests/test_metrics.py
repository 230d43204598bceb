"""The metrics of the figures, against slow references."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import PHONEMES, border_distance, calibration, confusion_matrix

repeatable = settings(derandomize=True, deadline=None, database=None, max_examples=100)


@repeatable
@given(st.lists(st.tuples(st.integers(0, 41), st.integers(0, 41)), max_size=60),
       st.sampled_from(["uint8", "int32", "int64"]), st.sampled_from(["uint8", "int32", "int64"]))
def test_confusion_matrix(pairs, label_dtype, prediction_dtype):
    expected = [[0] * 42 for _ in range(42)]
    for label, prediction in pairs:
        expected[label][prediction] += 1
    labels, predictions = np.array(pairs, int).reshape(-1, 2).T
    matrix = confusion_matrix(labels.astype(label_dtype), predictions.astype(prediction_dtype))
    assert matrix.dtype == np.int64 and matrix.tolist() == expected
    matrix = confusion_matrix(torch.from_numpy(labels.copy()), torch.from_numpy(predictions.copy()))
    assert matrix.tolist() == expected and len(PHONEMES) == 42


def slow_border_distance(utterances):
    distances = []
    for labels in utterances:
        borders = [0, *(t for t in range(1, len(labels)) if labels[t] != labels[t - 1]), len(labels)]
        for t in range(len(labels)):
            distances.append(min(min(abs(t - border), abs(t + 1 - border)) for border in borders))
    return distances


@repeatable
@given(st.lists(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 9)), min_size=1, max_size=6), min_size=1,
                max_size=5))
def test_border_distance(phones):
    utterances = [[label for label, length in runs for _ in range(length)] for runs in phones]
    starts = [0, *itertools.accumulate(map(len, utterances))]
    labels = np.array([label for labels in utterances for label in labels], np.uint8)
    distances = border_distance(labels, starts)
    assert distances.tolist() == slow_border_distance(utterances)
    assert border_distance(torch.from_numpy(labels), torch.tensor(starts)).tolist() == distances.tolist()


def test_border_distance_by_hand():
    assert border_distance([1, 1, 1, 1, 1, 2, 2], [0, 7]).tolist() == [0, 1, 2, 1, 0, 0, 0]
    assert border_distance([1, 1, 1, 1, 1, 1], [0, 2, 6]).tolist() == [0, 0, 0, 1, 1, 0]  # an utterance ends inside


def slow_calibration(confidences, correct, bins):
    rows, error = [], 0
    for i in range(bins):
        inside = [j for j, c in enumerate(confidences) if i / bins < c <= (i + 1) / bins or (c == 0 and i == 0)]
        if inside:
            confidence = math.fsum(confidences[j] for j in inside) / len(inside)
            accuracy = sum(correct[j] for j in inside) / len(inside)
            error += abs(confidence - accuracy) * len(inside) / len(confidences)
        rows.append((confidence, accuracy, len(inside)) if inside else (np.nan, np.nan, 0))
    return *np.array(rows).T, error


@repeatable
@given(st.lists(st.tuples(st.one_of(st.integers(0, 999).map(lambda i: (i + 0.5) / 1000), st.sampled_from([0, 0.5, 1])),
                          st.booleans()), min_size=1, max_size=80), st.sampled_from([1, 2, 10]))
def test_calibration(answers, bins):
    confidences, correct = (list(column) for column in zip(*answers))
    result = calibration(np.array(confidences), np.array(correct), bins)
    for got, expected in zip(result, slow_calibration(confidences, correct, bins)):
        np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-12)
    for got, expected in zip(calibration(np.array(confidences, np.float32), np.array(correct), bins), result):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_calibration_by_hand():
    confidence, accuracy, count, error = calibration([0.95, 0.95, 0.55, 0.55], [True, True, True, False])
    assert count.tolist() == [0, 0, 0, 0, 0, 2, 0, 0, 0, 2] and np.isnan(confidence[0]) and np.isnan(accuracy[0])
    assert (confidence[9], accuracy[9], confidence[5], accuracy[5]) == (0.95, 1, 0.55, 0.5)
    assert error == pytest.approx(0.05)
