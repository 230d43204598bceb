"""The metrics of the figures, against slow references."""

import itertools

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import PHONEMES, border_distance, confusion_matrix

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
