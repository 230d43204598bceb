"""A tiny random corpus, and slow, obvious ways of reading and labelling to compare ours with."""

import os
import shutil

import numpy as np
import torch

from helpers import PHONEMES, read_submission, write_submission

FLOAT16 = {
    "rtol": 1.001 * 2**-11,
    "atol": 2**-25,
}  # the rounding errors of float16, relative and near zero


def write_partition(root, partition, lengths, seed=0):
    """Random utterances of these lengths in the course's layout; returns the partition's folder."""
    rng = np.random.default_rng(seed)
    folder = root / partition
    for kind in ("mfcc",) if partition == "test-clean" else ("mfcc", "transcript"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for i, length in enumerate(lengths):
        mfcc = rng.normal(10 * rng.normal(size=28), rng.uniform(0.1, 20, 28), (length, 28)).astype(
            np.float32
        )
        np.save(folder / "mfcc" / f"{i:04d}.npy", mfcc)
        if partition != "test-clean":
            labels = np.repeat(rng.choice(PHONEMES[:40], length), rng.integers(1, 9, length))[
                :length
            ]
            np.save(folder / "transcript" / f"{i:04d}.npy", np.array(["[SOS]", *labels, "[EOS]"]))
    return folder


def read_partition(root, partition, subset=1):
    """[(mfcc, labels), ...]: float64 (T, 28), normalised over time, and a list of T indexes.

    The labels of the test partition are None.
    Raises ValueError where the files are not what they should be.
    """
    names = sorted(
        name
        for name in os.listdir(root / partition / "mfcc")
        if name.endswith(".npy") and not name.startswith(".")
    )
    if partition != "test-clean":
        names = names[: int(subset * len(names))]
    utterances = []
    for name in names:
        mfcc = np.load(root / partition / "mfcc" / name, allow_pickle=False)
        if (
            mfcc.dtype.kind != "f"
            or mfcc.ndim != 2
            or mfcc.shape[1] != 28
            or not np.isfinite(mfcc).all()
        ):
            raise ValueError(f"{name}: MFCCs")
        largest = np.abs(mfcc.astype(np.float64)).max(axis=0)
        largest[largest == 0] = (
            1  # everything is divided by it, so that no square is too large for float64
        )
        mfcc = mfcc / largest
        with np.errstate(over="ignore"):
            mfcc = (mfcc - mfcc.mean(axis=0)) / (mfcc.std(axis=0) + 1e-8 / largest)
        labels = None
        if partition != "test-clean":
            transcript = np.load(
                root / partition / "transcript" / name, allow_pickle=False
            ).tolist()
            if (transcript[0], transcript[-1], len(transcript)) != (
                "[SOS]",
                "[EOS]",
                len(mfcc) + 2,
            ):
                raise ValueError(f"{name}: transcript")
            labels = [PHONEMES[:40].index(phoneme) for phoneme in transcript[1:-1]]
        utterances.append((mfcc, labels))
    return utterances


def cut_corpus(root, new_root, frames):
    """Copy a corpus of ours, with at most `frames` frames of each utterance. Returns its folder."""
    shutil.copytree(root, new_root)
    for path in new_root.rglob("transcript/*.npy"):
        transcript = np.load(path)
        np.save(
            path,
            np.append(transcript[: frames + 1], "[EOS]")
            if len(transcript) > frames + 2
            else transcript,
        )
    answers, kept = iter(read_submission(root / "answers.csv")), []
    for path in sorted(new_root.rglob("mfcc/*.npy")):
        mfcc = np.load(path)
        np.save(path, mfcc[:frames])
        if path.parts[-3] == "test-clean":
            labels = [next(answers) for _ in mfcc]
            kept += labels[:frames]
    write_submission(new_root / "answers.csv", kept)
    return new_root


def windows_of(mfcc, context):
    """List of T windows (2 * context + 1, 28) of one utterance (T, 28), zeros beyond its ends."""
    padded = np.pad(mfcc, ((context, context), (0, 0)))
    return [padded[t : t + 2 * context + 1] for t in range(len(mfcc))]


def contents(root):
    """The bytes of each file below a folder, without the files of locks."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and path.suffix != ".lock"
    }


def packed_equal(first, second):
    return all(
        first[key].dtype == second[key].dtype and torch.equal(first[key], second[key])
        for key in first
    )


def check_windows(dataset, utterances, inside=5):
    """Compare the windows at the ends of the utterances, and some inside, singly and as a batch."""
    context = dataset.context
    assert len(dataset) == sum(len(mfcc) for mfcc, _ in utterances)
    indexes, windows, labels, first = [], [], [], 0
    for mfcc, phonemes in utterances:
        length = len(mfcc)
        wanted = {
            *range(min(context + 1, length)),
            *range(max(length - context - 1, 0), length),
            *np.linspace(0, length - 1, inside).astype(int).tolist(),
        }
        every = windows_of(mfcc, context)
        for t in sorted(wanted):
            indexes.append(first + t)
            windows.append(every[t])
            labels.append(phonemes and phonemes[t])
        first += length
    batch = dataset[torch.tensor(indexes)]
    if dataset.partition == "test-clean":
        frames, singles = batch, [dataset[i] for i in indexes]
    else:
        frames, phonemes = batch
        singles, single_labels = zip(*(dataset[i] for i in indexes))
        assert phonemes.dtype == torch.int64
        assert phonemes.tolist() == labels == [int(label) for label in single_labels]
    assert frames.shape == (len(indexes), 2 * context + 1, 28) and frames.dtype == torch.float16
    np.testing.assert_allclose(frames.numpy().astype(np.float64), np.array(windows), **FLOAT16)
    assert torch.equal(torch.stack(tuple(singles)), frames)


def labels_at_centres(phones, frames):
    """The label of each frame: the phone that holds the centre of its window, else silence.

    phones: [(name, start, end), ...] in seconds; of several that overlap, the last one counts.
    """
    centres = [(160 * t + 200) / 16000 for t in range(frames)]
    return [
        [phone for phone, start, end in [("[SIL]", 0, 999), *phones] if start <= centre < end][-1]
        for centre in centres
    ]
