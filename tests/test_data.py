"""Windows, labels, order and batches of the loader, compared with a slow reference."""

import itertools
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.mutations import write
from support.reference import FLOAT16, check_windows, read_partition, write_partition

import helpers
from helpers import PHONEMES, AudioDataset, Batches, make_loader

PARTITIONS = helpers.PARTITIONS
repeatable = settings(derandomize=True, deadline=None, database=None, max_examples=40)


# ---- Windows -------------------------------------------------------------------------------------


SLOW = [pytest.param(context, marks=pytest.mark.slow) for context in (1, 50, 60)]


@pytest.mark.parametrize("context", [0, 7, *SLOW])
@pytest.mark.parametrize("partition", PARTITIONS)
def test_windows_at_the_ends_of_utterances_longer_and_shorter_than_the_context(
    corpus, tmp_path, partition, context
):
    write_partition(tmp_path, partition, [1, 1, 3, 200, 1, 49, 50, 51, 101, 2, 1])
    for root in (corpus, tmp_path):
        check_windows(AudioDataset(root, partition, context), read_partition(root, partition))


@repeatable
@given(
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=6),
    context=st.integers(0, 70),
    partition=st.sampled_from(PARTITIONS),
    seed=st.integers(0, 99),
)
def test_windows_of_any_lengths_and_context(lengths, context, partition, seed):
    with tempfile.TemporaryDirectory() as folder:
        write_partition(Path(folder), partition, lengths, seed)
        check_windows(
            AudioDataset(folder, partition, context),
            read_partition(Path(folder), partition),
            inside=90,
        )


def test_utterance_gives_what_the_files_hold(corpus):
    for partition in PARTITIONS:
        dataset = AudioDataset(corpus, partition)
        for i, (mfcc, labels) in enumerate(read_partition(corpus, partition)):
            frames, phonemes = dataset.utterance(i)
            np.testing.assert_allclose(frames.double(), mfcc, **FLOAT16)
            assert phonemes is None if labels is None else phonemes.tolist() == labels


def test_what_float16_costs(corpus):
    dataset, largest, largest_error = AudioDataset(corpus), 0, 0
    for i, (mfcc, _) in enumerate(read_partition(corpus, "train-clean-100")):
        error = np.abs(dataset.utterance(i)[0].double().numpy() - mfcc)
        normal = np.abs(mfcc) >= 2**-14
        assert (error[normal] / np.abs(mfcc[normal])).max() <= 2**-11 * 1.001  # 0.05%
        assert error[~normal].max(initial=0) <= 2**-25 * 1.001
        largest, largest_error = max(largest, np.abs(mfcc).max()), max(largest_error, error.max())
    assert largest < 32 and largest_error < 2**-7  # of values with a standard deviation of 1


# ---- Reading -------------------------------------------------------------------------------------


def test_utterances_come_in_sorted_order(tmp_path, monkeypatch):
    folder = write_partition(tmp_path, "dev-clean", [3, 5, 7, 11])
    names = ["b.npy", "10.npy", "2.npy", "B-1.npy"]
    for kind in ("mfcc", "transcript"):
        for old, new in zip(sorted((folder / kind).iterdir()), names):
            old.rename(folder / kind / new)
    listdir = os.listdir
    monkeypatch.setattr(
        helpers.os, "listdir", lambda path: sorted(listdir(path), key=lambda name: name[::-1])
    )
    dataset = AudioDataset(tmp_path, "dev-clean", 1)
    assert dataset.offsets.diff().tolist() == [5, 7, 11, 3]  # 10.npy, 2.npy, B-1.npy, b.npy
    check_windows(dataset, read_partition(tmp_path, "dev-clean"))


@pytest.mark.parametrize(
    "subset, expected", [(0.1, 1), (0.19, 1), (0.25, 2), (0.7, 7), (0.999, 9), (1, 10)]
)
def test_subset_takes_the_first_utterances(tmp_path, subset, expected):
    lengths = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]
    for partition in PARTITIONS:
        write_partition(tmp_path, partition, lengths)
        dataset = AudioDataset(tmp_path, partition, 2, subset)
        assert dataset.utterances == (10 if partition == "test-clean" else expected)
        assert len(dataset) == sum(lengths[: dataset.utterances])
        check_windows(dataset, read_partition(tmp_path, partition, subset))


def test_indexes_count_from_either_end_and_end_there(tmp_path):
    write_partition(tmp_path, "dev-clean", [4, 5])
    write_partition(tmp_path, "test-clean", [4, 5])
    dataset, unlabelled = (AudioDataset(tmp_path, name, 3) for name in ("dev-clean", "test-clean"))
    for i in range(9):
        assert torch.equal(dataset[i - 9][0], dataset[i][0]) and dataset[i - 9][1] == dataset[i][1]
        assert torch.equal(unlabelled[i - 9], unlabelled[i])
        assert torch.equal(dataset[np.int64(i)][0], dataset[torch.tensor(i)][0])
    for bad in (9, -10, 10**9, *map(torch.tensor, ([9], [0, -1], [3, 10**6]))):
        for data in (dataset, unlabelled):
            with pytest.raises(IndexError):
                data[bad]


def test_markers_are_stripped_and_labels_index_the_phonemes(tmp_path):
    folder = write_partition(tmp_path, "dev-clean", [40, 1])
    np.save(folder / "transcript" / "0000.npy", np.array(["[SOS]", *PHONEMES[:40], "[EOS]"]))
    np.save(folder / "transcript" / "0001.npy", np.array(["[SOS]", "ZH", "[EOS]"]))
    dataset = AudioDataset(tmp_path, "dev-clean", 0)
    assert dataset[torch.arange(41)][1].tolist() == [*range(40), 39]
    assert (
        len(PHONEMES) == 42 and PHONEMES[0] == "[SIL]" and PHONEMES[39:] == ["ZH", "[SOS]", "[EOS]"]
    )


def test_normalisation_is_over_time(tmp_path):
    folder = write_partition(tmp_path, "dev-clean", [300])
    mfcc = np.load(folder / "mfcc" / "0000.npy").astype(np.float64)
    frames = AudioDataset(tmp_path, "dev-clean").utterance(0)[0].double().numpy()
    np.testing.assert_allclose(frames.mean(0), 0, atol=1e-3)
    np.testing.assert_allclose(frames.std(0), 1, atol=1e-3)
    over_coefficients = (mfcc - mfcc.mean(1, keepdims=True)) / (mfcc.std(1, keepdims=True) + 1e-8)
    over_both = (mfcc - mfcc.mean()) / mfcc.std()
    assert np.abs(frames - over_coefficients).max() > 1 and np.abs(frames - over_both).max() > 1


@pytest.mark.parametrize(
    "dtype, value",
    [
        *itertools.product(["f2", "f4", "f8"], [0, 0.1, -3.3, 12345.678]),
        ("f4", 1e30),
        ("f8", 1e9 + 0.1),
        ("f8", -1e300),
    ],
)
def test_a_constant_coefficient_becomes_zero(tmp_path, dtype, value):
    folder = write_partition(tmp_path, "dev-clean", [1000])
    mfcc = np.load(folder / "mfcc" / "0000.npy").astype(dtype)
    mfcc[:, 7] = value
    np.save(folder / "mfcc" / "0000.npy", mfcc)
    frames = AudioDataset(tmp_path, "dev-clean").utterance(0)[0]
    assert not frames[:, 7].any() and frames[:, 6].any()


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize(
    "kind, dtype",
    [
        *(("mfcc", dtype) for dtype in ("<f4", ">f4", "<f8", ">f8", "<f2", ">f2")),
        *(("transcript", dtype) for dtype in ("<U5", ">U5", "<U20")),
    ],
)
def test_other_ways_to_store_the_same(tmp_path, kind, dtype, order, version):
    path = write_partition(tmp_path, "dev-clean", [20]) / kind / "0000.npy"
    array = np.load(path)
    if kind == "mfcc":
        array = array.astype(np.float16).astype(
            np.float32
        )  # numbers that every dtype here can hold
        np.save(path, array)
    expected = AudioDataset(tmp_path, "dev-clean")
    write(path, np.asarray(array, dtype, order=order), version=version)
    stored, dataset = np.load(path), AudioDataset(tmp_path, "dev-clean")
    assert stored.dtype == dtype and (
        stored.ndim == 1 or stored.flags.f_contiguous == (order == "F")
    )
    assert torch.equal(dataset.frames, expected.frames) and torch.equal(
        dataset.labels, expected.labels
    )


# ---- Batches -------------------------------------------------------------------------------------


def order_of(loader):
    return torch.cat(list(loader.sampler)).tolist()


@pytest.mark.parametrize("partition", ["dev-clean", "test-clean"])
@pytest.mark.parametrize("shuffle", [False, True])
def test_a_batch_is_what_its_indexes_say(tmp_path, partition, shuffle):
    write_partition(tmp_path, partition, [30, 13, 60])
    dataset = AudioDataset(tmp_path, partition, 4)
    loader = make_loader(dataset, 20, shuffle)
    assert len(loader) == len(list(loader)) == 6  # 103 frames: the last batch has 3
    if not shuffle:
        assert order_of(loader) == list(range(103))
    for indexes, batch, size in zip(loader.sampler, loader, [20] * 5 + [3]):
        expected = [dataset[i] for i in indexes.tolist()]
        if partition == "dev-clean":
            batch, phonemes = batch
            expected, labels = zip(*expected)
            assert phonemes.dtype == torch.int64 and torch.equal(phonemes, torch.stack(labels))
        assert batch.shape == (size, 9, 28) and batch.dtype == torch.float16
        assert torch.equal(batch, torch.stack([*expected]))


@repeatable
@given(
    length=st.integers(1, 300),
    batch_size=st.integers(2, 40),
    epoch=st.integers(0, 5),
    shuffle=st.booleans(),
)
def test_every_frame_comes_once_an_epoch(length, batch_size, epoch, shuffle):
    sampler = Batches(length, batch_size, shuffle)
    sampler.set_epoch(epoch)
    batches = [batch.tolist() for batch in sampler]
    one_over = shuffle and length % batch_size == 1  # BatchNorm cannot train on it
    indexes = [i for batch in batches for i in batch]
    assert len(batches) == len(sampler) and len(set(indexes)) == len(indexes) == length - one_over
    assert set(indexes) <= set(range(length))
    assert all(len(batch) == batch_size for batch in batches[:-1])
    if not shuffle:
        assert indexes == list(range(length))


def test_a_last_batch_of_one_frame_waits_for_another_epoch():
    left_out = set()
    for epoch in range(20):
        sampler = Batches(41, 8, shuffle=True)
        sampler.set_epoch(epoch)
        assert [len(batch) for batch in sampler] == [8] * 5
        left_out |= set(range(41)) - set(torch.cat(list(sampler)).tolist())
    assert len(left_out) > 5
    assert [len(batch) for batch in Batches(41, 8)] == [8] * 5 + [1]


def test_the_order_depends_on_seed_and_epoch_only(tmp_path):
    write_partition(tmp_path, "dev-clean", [30, 13, 60])
    dataset = AudioDataset(tmp_path, "dev-clean", 4)
    orders = {}
    for seed in (23, 24):
        for epoch in (1, 5, 9):
            loader = make_loader(dataset, 20, shuffle=True, seed=seed)
            loader.sampler.set_epoch(epoch)
            orders[seed, epoch] = order_of(loader)
    assert len({tuple(order) for order in orders.values()}) == 6
    assert orders[23, 1] != sorted(orders[23, 1])

    torch.manual_seed(1)  # other random numbers, an unfinished epoch, another sequence of epochs
    loader = make_loader(dataset, 20, shuffle=True, seed=23)
    next(iter(loader))
    for epoch in (9, 5, 1):
        torch.rand(epoch)
        loader.sampler.set_epoch(epoch)
        assert order_of(loader) == orders[23, epoch] == order_of(loader)


def test_shuffling_draws_no_global_random_numbers():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    list(Batches(100, 8, shuffle=True))
    assert torch.equal(torch.get_rng_state(), state)
