"""Sequence decoding against all paths of short sequences, and its counts against a loop."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import Decoder, count_transitions, viterbi

repeatable = settings(derandomize=True, deadline=None, database=None, max_examples=60)


def offsets_of(lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)])


def best_path(scores, transitions):
    """The best of all paths of one utterance (T, k), by trying each."""

    def total(path):
        return sum(scores[t, state] for t, state in enumerate(path)) + sum(
            transitions[a, b] for a, b in zip(path, path[1:])
        )

    return max(itertools.product(range(scores.shape[1]), repeat=len(scores)), key=total)


@repeatable
@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    states=st.integers(1, 3),
    seed=st.integers(0, 999),
)
def test_viterbi_finds_the_best_of_all_paths_of_each_utterance(lengths, states, seed):
    rng = np.random.default_rng(seed)
    scores, transitions = rng.normal(size=(sum(lengths), states)), rng.normal(size=(states, states))
    offsets = offsets_of(lengths)
    path = viterbi(
        torch.tensor(scores, dtype=torch.float32),
        torch.tensor(transitions, dtype=torch.float32),
        offsets,
    )
    expected = [
        state
        for first, end in zip(offsets, offsets[1:])
        for state in best_path(scores[first:end], transitions)
    ]
    assert path.dtype == torch.int64 and path.tolist() == expected


def test_no_transition_crosses_the_end_of_an_utterance():
    scores = torch.tensor([[1.0, 0.0]] * 3 + [[0.0, 1.0]] * 3)
    stay = torch.tensor([[0.0, -100.0], [-100.0, 0.0]])
    assert viterbi(scores, stay, torch.tensor([0, 3, 6])).tolist() == [0, 0, 0, 1, 1, 1]
    assert len(set(viterbi(scores, stay, torch.tensor([0, 6])).tolist())) == 1


@pytest.mark.slow
def test_long_utterances_are_decoded_exactly():
    torch.manual_seed(1)
    scores, transitions = torch.randn(20_000, 5) - 50, torch.randn(5, 5)
    offsets = torch.tensor([0, 19_990, 20_000])
    exact = viterbi(scores.double(), transitions.double(), offsets)  # sums of a million
    assert (viterbi(scores, transitions, offsets) == exact).float().mean() > 0.9999


@repeatable
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_transitions_are_counted_inside_utterances_with_add_one(lengths, seed):
    n, offsets = 40, offsets_of(lengths)  # [SOS] and [EOS] are no frame's
    labels = torch.from_numpy(
        np.random.default_rng(seed).integers(0, 5, sum(lengths)).astype(np.uint8)
    )
    pairs, single = np.ones((n, n)), np.ones(n)
    for first, end in zip(offsets.tolist(), offsets.tolist()[1:]):
        for t in range(first, end):
            single[labels[t]] += 1
            if t > first:
                pairs[labels[t - 1], labels[t]] += 1
    prior, transitions = count_transitions(labels, offsets)
    assert prior.dtype == transitions.dtype == torch.float32
    np.testing.assert_allclose(prior.exp(), single / single.sum(), rtol=1e-5)
    np.testing.assert_allclose(transitions.exp(), pairs / pairs.sum(1, keepdims=True), rtol=1e-5)


@pytest.fixture
def noisy():
    """(log posteriors, labels, offsets): labels that stay for ten frames, posteriors with noise."""
    torch.manual_seed(2)
    labels = torch.randint(0, 40, (60,)).repeat_interleave(10)
    logits = 2.0 * torch.nn.functional.one_hot(labels, 42) + torch.randn(600, 42)
    return logits.log_softmax(1), labels.to(torch.uint8), torch.tensor([0, 200, 230, 600])


PAIRS = [*itertools.product((0, 0.15, 0.3, 0.45), (0.25, 0.5, 0.75, 1, 1.5))]


def right(log_posteriors, labels, offsets, pair, which=...):
    """How many of these frames a decoder with this pair of weights gets right."""
    path = Decoder(labels, offsets, *pair)(log_posteriors, offsets)
    return (path == labels)[which].sum().item()


def test_decoding_repairs_flickering_and_the_choice_is_the_best_pair(noisy):
    log_posteriors, labels, offsets = noisy
    decoder = Decoder(labels, offsets)
    path = decoder.tune(log_posteriors, labels, offsets)
    assert (path == labels).float().mean() > (
        log_posteriors.argmax(1) == labels
    ).float().mean() + 0.2
    chosen = right(
        log_posteriors, labels, offsets, (decoder.prior_scale, decoder.transition_weight)
    )
    assert chosen == max(right(log_posteriors, labels, offsets, pair) for pair in PAIRS)


def test_without_transitions_it_is_frame_by_frame(noisy):
    log_posteriors, labels, offsets = noisy
    assert torch.equal(
        Decoder(labels, offsets, 0, 0)(log_posteriors, offsets), log_posteriors[:, :40].argmax(1)
    )


def test_scale_takes_the_prior_out(noisy):
    log_posteriors, labels, offsets = noisy
    decoder = Decoder(labels, offsets, prior_scale=0.5, transition_weight=0)
    prior, _ = count_transitions(labels, offsets)
    assert torch.equal(
        decoder(log_posteriors, offsets), (log_posteriors[:, :40] - 0.5 * prior).argmax(1)
    )
    assert not torch.equal(decoder(log_posteriors, offsets), log_posteriors.argmax(1))


def test_each_half_is_decoded_by_what_is_best_on_the_other():
    torch.manual_seed(4)
    offsets = offsets_of([30, 20, 50, 40, 10])
    labels = torch.randint(0, 40, (15,)).repeat_interleave(10)
    logits = 2.0 * torch.nn.functional.one_hot(labels, 42)
    odd = torch.zeros(150, dtype=torch.bool)
    odd[30:50] = odd[100:140] = True
    log_posteriors = (
        logits + torch.randn(150, 42) * torch.where(odd, 0.5, 1.5)[:, None]
    ).log_softmax(1)
    path = Decoder(labels, offsets).tune(log_posteriors, labels, offsets)
    best = {}
    for half, inside in ((0, ~odd), (1, odd)):
        best[half] = max(
            PAIRS, key=lambda pair: right(log_posteriors, labels, offsets, pair, inside)
        )
    assert best[0] != best[1]
    for pair, inside in ((best[1], ~odd), (best[0], odd)):
        assert torch.equal(
            path[inside], Decoder(labels, offsets, *pair)(log_posteriors, offsets)[inside]
        )


@pytest.mark.slow
def test_the_labels_of_a_half_have_no_say_in_how_it_is_decoded(noisy):
    log_posteriors, labels, offsets = noisy
    odd = torch.zeros(600, dtype=torch.bool)
    odd[200:230] = True
    path, same = (
        Decoder(labels, offsets).tune(log_posteriors, truth, offsets)
        for truth in (labels, torch.where(odd, 0, labels))
    )
    assert torch.equal(path[odd], same[odd])


def test_of_many_frames_some_are_enough_for_the_choice_from_all_over_the_set():
    offsets, seen = offsets_of([10] * 40), []

    class Counting(Decoder):
        def __call__(self, log_posteriors, offsets):
            seen.append((len(log_posteriors), offsets.tolist()))
            return super().__call__(log_posteriors, offsets)

    labels = torch.randint(0, 40, (400,))
    path = Counting(labels, offsets).tune(
        torch.randn(400, 42).log_softmax(1), labels, offsets, frames=100
    )
    assert seen[:40] == 40 * [(50, [0, 10, 20, 30, 40, 50])]
    assert [frames for frames, _ in seen[40:]] == [200, 200] and len(path) == 400


@pytest.mark.slow
def test_a_single_utterance_is_chosen_and_judged_on(noisy):
    log_posteriors, labels, _ = noisy
    offsets = torch.tensor([0, 600])
    decoder = Decoder(labels, offsets)
    path = decoder.tune(log_posteriors, labels, offsets)
    assert torch.equal(path, decoder(log_posteriors, offsets))


def test_only_the_forty_phonemes_come_out(noisy):
    log_posteriors, labels, offsets = noisy
    log_posteriors = log_posteriors.clone()
    log_posteriors[:, 40:] = 0.0  # [SOS] and [EOS], as sure as can be
    for scale, weight in ((0.45, 0.25), (0, 0)):
        assert Decoder(labels, offsets, scale, weight)(log_posteriors, offsets).max() < 40
