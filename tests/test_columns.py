"""Which MFCCs: HTK's columns (the course's) or torchaudio's; 28, 27, 15 or 13 of them."""

import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from support.configs import TINY
from support.notebook import Session, definitions, run_cells

import helpers
from helpers import AudioDataset, DataError

# an utterance of the course's with 27 columns, as printed: the means of c1 ... c4 and c0, and all
# standard deviations
PRINTED_MEANS = [13.6, 6.7, 15.7, 1.3] + [0.0] * 22 + [118.2]
PRINTED_STDS = [
    14.2,
    14.8,
    14.6,
    17.1,
    17.2,
    18.3,
    15.2,
    12.7,
    11.3,
    12.4,
    11.2,
    9.2,
    8.9,
    8.2,
    7.6,
    5.6,
    4.9,
    3.4,
    3.3,
    1.7,
    1.2,
    0.47,
    0.24,
    0.80,
    1.13,
    0.00,
    15.3,
]


def copy(corpus, root, change, labels=lambda array: array):
    """A copy of a corpus with its MFCCs, and its transcripts, changed."""
    shutil.copytree(corpus, root)
    for path in root.glob("*/mfcc/*.npy"):
        np.save(path, np.ascontiguousarray(change(np.load(path))))
    for path in root.glob("*/transcript/*.npy"):
        np.save(path, labels(np.load(path)))
    return root


def to_torchaudios_order(mfcc):
    lifter = 1 + 11 * np.sin(np.pi * np.arange(1, mfcc.shape[1]) / 22)
    return np.hstack([mfcc[:, -1:] / 2**0.5, mfcc[:, :-1] / lifter]).astype(np.float32)


def first_coefficients(n):
    """The first n coefficients of HTK's features, c0 among them and last again."""
    return lambda mfcc: mfcc[:, [*range(n - 1), -1]]


@pytest.fixture(scope="module")
def turned(corpus, tmp_path_factory):
    """The corpus in torchaudio's order."""
    return copy(corpus, tmp_path_factory.mktemp("turned") / "corpus", to_torchaudios_order)


# ---- The convention ------------------------------------------------------------------------------


def test_columns_of_htk():
    order, factors = helpers.columns_of("HTK", 28)
    assert order.tolist() == [*range(1, 28), 0]
    assert factors[:2].tolist() == pytest.approx([2.565, 4.099], abs=1e-3)
    assert factors[10].item() == pytest.approx(12)  # c11
    assert (
        factors[21].item() == pytest.approx(1, abs=1e-5) and (factors[22:27] < 0).all()
    )  # c22; c23 and on
    assert factors[27].item() == pytest.approx(2**0.5)
    order, factors = helpers.columns_of("torchaudio", 28)
    assert order.tolist() == [*range(28)] and factors.tolist() == [1] * 28


def test_our_corpora_have_the_courses_columns(corpus):
    assert AudioDataset(corpus, "train-clean-100").convention == "HTK"
    mfcc = np.concatenate(
        [np.load(path) for path in (corpus / "train-clean-100" / "mfcc").iterdir()]
    )
    assert mfcc[:, -1].mean() > 90 and np.abs(mfcc[:, :-1].mean(0)).max() < 40


def test_the_courses_own_figures_are_htks():
    assert helpers.find_convention(torch.tensor(PRINTED_MEANS), torch.tensor(PRINTED_STDS)) == "HTK"


def test_torchaudios_order_is_known_too(turned):
    assert AudioDataset(turned, "train-clean-100").convention == "torchaudio"


@pytest.mark.parametrize(
    "change",
    [
        lambda mfcc: mfcc[:, [*range(13), 27, *range(13, 27)]],  # c0 in the middle
        lambda mfcc: mfcc[:, [27, *range(27)]],  # Kaldi's default: c0 first, but liftered
        lambda mfcc: to_torchaudios_order(mfcc)[:, [*range(1, 28), 0]],  # c0 last, not liftered
        lambda mfcc: (mfcc - mfcc.mean(0)) / mfcc.std(0),  # normalised before
        lambda mfcc: mfcc[:, :-1],
    ],
)  # without c0
def test_what_is_neither_is_not_guessed(corpus, tmp_path, change):
    assert (
        AudioDataset(copy(corpus, tmp_path / "copy", change), "train-clean-100").convention is None
    )


def test_validation_and_test_follow_the_training_set(corpus, turned):
    train = AudioDataset(turned, "train-clean-100")
    for partition in ("dev-clean", "test-clean"):
        assert AudioDataset(corpus, partition).convention == "HTK"
        assert AudioDataset(corpus, partition, like=train).convention == "torchaudio"


def test_the_convention_comes_from_the_cache_too(turned, tmp_path):
    for _ in range(2):
        assert AudioDataset(turned, "train-clean-100", cache=tmp_path).convention == "torchaudio"
    assert len([*tmp_path.glob("*.safetensors")]) == 1


@pytest.mark.slow
def test_both_orders_end_with_the_same_accuracy(practice_corpus, tmp_path, monkeypatch):
    turned = copy(practice_corpus, tmp_path / "turned" / "corpus", to_torchaudios_order)
    book = definitions()
    book.update(device="cpu", show_progress=lambda *_: None)
    accuracies = {}
    for root in (practice_corpus, turned):
        monkeypatch.setenv("HW1P2_DATA", str(root))
        monkeypatch.setenv("HW1P2_RUNS", str(tmp_path / root.parent.name))
        for seed in (23, 24):
            config = {
                **book["config"],
                **TINY,
                "epochs": 4,
                "learning_rate": 0.003,
                "lr_scale": 1,
                "seed": seed,
                "Name": f"seed {seed}",
                "wandb": "disabled",
            }
            run = book["make_run"](config)
            book["fit"](run)
            predicted = book["log_probabilities"](run, run.val_loader).argmax(1)
            right = predicted == run.val_loader.dataset.labels
            accuracies.setdefault(root, []).append(right.float().mean().item())
    first, second = (np.mean(each) for each in accuracies.values())
    assert (
        0.6 < first < 1 and abs(first - second) < 0.03
    )  # one seed's standard deviation is about 0.01


@pytest.mark.slow
def test_unknown_columns_are_trained_on_without_warps_and_it_is_said(corpus, tmp_path, capsys):
    root = copy(corpus, tmp_path / "copy", lambda mfcc: mfcc[:, [*range(13), 27, *range(13, 27)]])
    session = Session(tmp_path / "runs", root, {**TINY, "epochs": 1})
    session.run_all("helpers.plot_phonemes(results")
    assert (
        capsys.readouterr().out.count("WARNING: these columns are neither HTK's nor torchaudio's")
        >= 2
    )
    assert [*session["results"].accuracy] == ["frame alone", "Viterbi"]


# ---- How many ------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [13, 15, 27])
def test_other_editions_are_read(corpus, tmp_path, n):
    root = copy(corpus, tmp_path / "copy", first_coefficients(n))
    data = AudioDataset(root, "train-clean-100")
    assert (data.coefficients, data.convention) == (n, "HTK")


@pytest.mark.slow
@pytest.mark.parametrize("n", [13, 27])
def test_other_editions_run_to_the_csv(corpus, tmp_path, n):
    def spelling_of_2022(labels):
        old = {"[SIL]": "SIL", "[SOS]": "<sos>", "[EOS]": "<eos>"}
        return np.array([old.get(label, label) for label in labels.tolist()])

    root = copy(
        corpus, tmp_path / "copy", first_coefficients(n), spelling_of_2022 if n < 27 else np.array
    )
    namespace = run_cells({**TINY, "epochs": 1}, runs=tmp_path / "runs", data=root)
    data = namespace["train_data"]
    assert (data.coefficients, data.convention) == (n, "HTK")
    assert torch.equal(data.labels, AudioDataset(corpus, "train-clean-100").labels)
    assert namespace["model"].model[0].in_features == 11 * n
    assert [*namespace["results"].accuracy] == ["frame alone", "mean over warps", "Viterbi"]
    answers = pd.read_csv(corpus / "answers.csv")["label"]
    labels = pd.read_csv(tmp_path / "runs" / "pencil" / "submission.csv")["label"]
    assert (labels == answers).mean() > 1.3 * answers.value_counts(normalize=True).max()


def test_test_data_of_another_number_are_refused(corpus, tmp_path):
    root = copy(corpus, tmp_path / "copy", lambda mfcc: mfcc)
    for path in (root / "test-clean" / "mfcc").iterdir():
        np.save(path, np.load(path)[:, 1:])
    train = AudioDataset(root, "train-clean-100")
    with pytest.raises(
        DataError, match="test-clean.mfcc: 27 MFCCs per frame; expected 28, as in train-clean-100"
    ):
        AudioDataset(root, "test-clean", like=train)


@pytest.mark.parametrize("other", [0, 2, -1])
def test_a_file_with_another_number_than_the_others_is_named(corpus, tmp_path, other):
    root = copy(corpus, tmp_path / "copy", first_coefficients(27))
    path = sorted((root / "dev-clean" / "mfcc").iterdir())[other]
    np.save(path, np.load(path)[:, 1:])
    with pytest.raises(
        DataError, match=rf"1 fault.*\n.*{path.name}: shape \(\d+, 26\); expected \(frames, 27\)"
    ):
        AudioDataset(root, "dev-clean")


def test_a_damaged_first_file_says_nothing_about_the_others(corpus, tmp_path):
    root = copy(corpus, tmp_path / "copy", first_coefficients(27))
    [first, *_] = sorted((root / "dev-clean" / "mfcc").iterdir())
    first.write_bytes(b"damaged")
    with pytest.raises(DataError, match=rf"1 fault.*\n.*{first.name}: "):
        AudioDataset(root, "dev-clean")
