"""The practice corpus: layout, labels, the same bytes on every run."""

import itertools
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import espeakng_loader
import numpy as np
import pytest
from support.notebook import ROOT
from support.reference import contents, labels_at_centres

import helpers
from helpers import (
    ARPABET,
    GRAMMAR,
    PANGRAMS,
    PARTITIONS,
    PHONEMES,
    VOICES,
    DataError,
    RunError,
)

PHONES = set(PHONEMES[1:40])
UTTERANCES = (24, 4, 3)  # of the fixture `practice_corpus`


@pytest.fixture
def corpus(practice_corpus):
    return practice_corpus


def transcripts(root, partition):
    """The labels of each utterance; those of the test partition are in answers.csv."""
    if partition < 2:
        paths = sorted((root / PARTITIONS[partition] / "transcript").iterdir())
        return [np.load(path)[1:-1] for path in paths]
    lengths = [len(np.load(path)) for path in sorted((root / "test-clean" / "mfcc").iterdir())]
    return np.split(
        helpers.read_submission(root / "answers.csv", sum(lengths)), np.cumsum(lengths)[:-1]
    )


def test_layout_is_the_courses(corpus):
    folders = {str(path.relative_to(corpus)) for path in corpus.rglob("*") if path.is_dir()}
    assert folders == {
        *PARTITIONS,
        *(f"{name}/mfcc" for name in PARTITIONS),
        "train-clean-100/transcript",
        "dev-clean/transcript",
    }
    for name, utterances in zip(PARTITIONS, UTTERANCES):
        paths = sorted((corpus / name / "mfcc").iterdir())
        assert len(paths) == utterances
        for path in paths:
            mfcc = np.load(path)
            assert mfcc.dtype == np.float32
            assert mfcc.shape == (len(mfcc), 28)
            assert mfcc.flags.c_contiguous
            assert np.isfinite(mfcc).all()
            if name != "test-clean":
                transcript = np.load(corpus / name / "transcript" / path.name)
                assert transcript.dtype == "<U5"
                assert len(transcript) == len(mfcc) + 2
                assert (transcript[0], transcript[-1]) == ("[SOS]", "[EOS]")
                assert set(transcript[1:-1]) <= PHONES | {"[SIL]"}


@pytest.mark.parametrize("partition", [0, 1, 2])
def test_every_partition_has_all_the_phones(corpus, partition):
    assert set(np.concatenate(transcripts(corpus, partition))) == PHONES | {"[SIL]"}


def check_labels(labels, partition, index):
    """Synthesise the utterance again; after some silence, the labels must fit."""
    audio, phones = helpers.speak(*helpers.practice_utterance(partition, index))
    begins = next(start for phone, start, _ in phones if phone != "[SIL]")
    silent = next(t for t, label in enumerate(labels) if label != "[SIL]")
    latest = (silent * 160 + 200) / 16000 - begins  # at the centre of that frame's window
    fits = [
        shift
        for shift in latest - np.arange(222) / helpers.ESPEAK_RATE
        if list(labels)
        == helpers.label_frames(
            [(phone, start + shift, end + shift) for phone, start, end in phones], len(labels)
        ).tolist()
    ]
    assert fits, "no shift makes the labels fit"
    after = (len(labels) * 160 + 240) / 16000 - fits[0] - len(audio) / helpers.ESPEAK_RATE
    assert 1 / 8 - 0.01 < fits[0] < 1 / 2 + 0.01
    assert 1 / 8 - 0.02 < after < 1 / 2 + 0.01


@pytest.mark.parametrize("partition", [pytest.param(0, marks=pytest.mark.slow), 1, 2])
def test_labels_are_what_is_said_between_two_silences(corpus, partition):
    for index, labels in enumerate(transcripts(corpus, partition)):
        check_labels(labels, partition, index)
        assert set(labels[:11]) == set(labels[-11:]) == {"[SIL]"}


def test_partitions_share_no_sentence_and_no_voice():
    scripts = [[helpers.practice_utterance(p, i) for i in range(2000)] for p in range(3)]
    everything = [text for part in scripts for text, *_ in part]
    assert len(set(everything)) == len(everything)  # so none is shared, and none comes twice
    assert [part[0][0] for part in scripts] == PANGRAMS
    assert [{voice for _, voice, *_ in part} for part in scripts] == [
        set(voices) for voices in VOICES
    ]
    assert len(set().union(*VOICES)) == sum(map(len, VOICES))
    for path in (
        Path(espeakng_loader.get_data_path(), "voices", "!v", voice)
        for voices in VOICES
        for voice in voices
    ):
        assert "\nbreath " not in path.read_text("utf-8", errors="replace"), (
            path
        )  # it comes out different each time


def test_the_same_seed_gives_the_same_bytes(corpus, tmp_path):
    helpers.make_practice_corpus(tmp_path / "again", UTTERANCES)
    files = contents(corpus)
    assert len(files) == sum(UTTERANCES) + sum(UTTERANCES[:2]) + 1
    assert contents(tmp_path / "again") == files


@pytest.mark.slow
def test_speech_does_not_depend_on_what_was_said_before():
    first, again = {}, {}
    for heard, order in (first, range(60)), (again, random.Random(1).sample(range(60), 60)):
        for i in order:
            audio, phones = helpers.speak(*helpers.practice_utterance(0, i))
            heard[i] = audio.tobytes(), phones
    assert first == again


@pytest.mark.slow
@pytest.mark.parametrize("voice", ["", "klatt4", "f1", "pedro"])
def test_the_whole_vocabulary_is_mapped(voice):
    # the sentences themselves too: a word may sound different beside others or at the end
    texts = [f"{entry}." for entries in GRAMMAR for entry in entries]
    texts += [*PANGRAMS, *(helpers.practice_utterance(0, i)[0] for i in range(1, 200))]
    _, phones = helpers.speak(" ".join(texts), voice, rate=400)
    assert {phone for phone, _, _ in phones} == PHONES | {"[SIL]"}
    assert (
        len({word for entries in GRAMMAR for entry in entries for word in entry.lower().split()})
        >= 100
    )


def test_an_unknown_mnemonic_is_refused(monkeypatch):
    monkeypatch.delitem(ARPABET, "aI")
    with pytest.raises(DataError, match="'aI' has no ARPAbet phone"):
        helpers.speak("My eye.")


def test_phones_follow_each_other_and_r_coloured_vowels_are_two():
    audio, phones = helpers.speak("A car.")
    assert [phone for phone, _, _ in phones if phone != "[SIL]"] == ["AH", "K", "AA", "R"]
    (_, start, middle), (_, again, end) = phones[2:4]
    assert middle == again and middle - start == pytest.approx(end - middle)
    assert all(end == start for (_, _, end), (_, start, _) in zip(phones, phones[1:]))
    assert phones[-1][2] == pytest.approx(len(audio) / helpers.ESPEAK_RATE)


@pytest.mark.parametrize("seed", range(20))
def test_labels_are_the_phones_at_the_centres_of_the_windows(seed):
    rng = np.random.default_rng(seed)
    starts = np.sort(rng.uniform(0, 1, 6))
    phones = [
        (phone, start, start + rng.uniform(0, 0.4))  # gaps and overlaps
        for phone, start in zip(["AA", "B", "[SIL]", "ZH", "D", "EH"], starts)
    ]
    labels = helpers.label_frames(phones, 120)
    assert labels.dtype == "<U5" and labels.tolist() == labels_at_centres(phones, 120)


def test_labels_fit_the_sound(corpus):
    scores = {}
    for shift in (0, 5, -5):
        silence, vowel, hiss = [], [], []
        for path in sorted((corpus / "dev-clean" / "mfcc").iterdir()):
            mfcc = np.load(path)
            labels = np.roll(np.load(corpus / "dev-clean" / "transcript" / path.name)[1:-1], shift)
            silence += [*mfcc[labels == "[SIL]", -1]]
            vowel += [*mfcc[np.isin(labels, ["AA", "AE", "AO", "IY", "EY", "OW"])]]
            hiss += [*mfcc[np.isin(labels, ["S", "Z", "SH"])]]
        # c0, the last one, is the log energy; c1, the first, falls when the energy moves to the
        # high frequencies
        scores[shift] = (
            np.mean(vowel, 0)[-1] - np.mean(silence),
            np.mean(vowel, 0)[0] - np.mean(hiss, 0)[0],
        )
    assert scores[0][0] > 1.05 * max(scores[5][0], scores[-5][0])
    assert scores[0][1] > 1.5 * max(scores[5][1], scores[-5][1])


def test_silent_audio_has_finite_features():
    assert np.isfinite(helpers.speech_features(np.zeros(22050, np.float32), 22050)).all()


def test_an_interrupted_build_does_not_look_finished(tmp_path):
    root = tmp_path / "corpus"
    with (
        mock.patch.object(helpers, "speak", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        helpers.make_practice_corpus(root, (1, 1, 1))
    assert not root.exists()
    (
        tmp_path / "corpus.partial" / "dev-clean" / "mfcc" / "stray.npy"
    ).touch()  # as a killed build leaves it
    helpers.make_practice_corpus(root, (1, 1, 1))
    assert [path.name for path in root.rglob("*.npy")] == ["000000.npy"] * 5
    assert not (tmp_path / "corpus.partial").exists()
    with pytest.raises(FileExistsError, match="exists already"):
        helpers.make_practice_corpus(root, (1, 1, 1))


def test_what_systems_leave_in_its_folders_is_no_data(tmp_path):
    with helpers._new_corpus(tmp_path / "corpus") as partial:
        for name in PARTITIONS:
            helpers._write_utterance(
                partial / name, "a", np.zeros(16000, np.float32), 16000, [("AA", 0, 1)]
            )
        for kind, name in itertools.product(
            helpers.KINDS, (".DS_Store", "._a.npy", "a.npy~", "a (1).npy")
        ):
            (partial / "test-clean" / kind / name).write_bytes(b"\0")
    assert set(helpers.read_submission(tmp_path / "corpus" / "answers.csv")) == {"AA"}
    with pytest.raises(DataError, match="no utterances for train-clean-100"):
        with helpers._new_corpus(tmp_path / "empty") as partial:
            (partial / "train-clean-100" / "mfcc" / ".DS_Store").touch()


def test_a_corpus_that_loses_utterances_while_it_is_made_is_refused(tmp_path, monkeypatch):
    speak = helpers.speak

    def lose(*arguments):
        for path in tmp_path.rglob("mfcc/*.npy"):
            path.unlink()
        return speak(*arguments)

    monkeypatch.setattr(helpers, "speak", lose)
    with pytest.raises(helpers.RunError, match="corpus.partial was changed by another process"):
        helpers.make_practice_corpus(tmp_path / "corpus", (2, 1, 1))
    assert not (tmp_path / "corpus").exists()


def test_a_full_disk_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(np, "save", mock.Mock(side_effect=OSError(28, "No space left on device")))
    with pytest.raises(
        helpers.RunError, match="corpus could not be made .*No space left.* MB are free"
    ):
        helpers.make_practice_corpus(tmp_path / "corpus", (1, 1, 1))


@pytest.mark.parametrize("utterances", [(1, 1), (0, 1, 1), (1, 1, 1, 1)])
def test_numbers_out_of_range_are_refused(tmp_path, utterances):
    with pytest.raises(DataError, match="expected"):
        helpers.make_practice_corpus(tmp_path / "corpus", utterances)
    assert not list(tmp_path.iterdir())


def test_errors_say_what_to_install(monkeypatch):
    with pytest.raises(DataError, match="nobody"):
        helpers.speak("Hello.", "nobody")
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(ImportError, match="pip install espeakng-loader"):
        helpers.speak("Hello.")


@pytest.mark.parametrize("torch_version, wanted", [("2.10.0+cu128", "2.10"), ("2.14.1", "2.11")])
@pytest.mark.parametrize(
    "error", [OSError("undefined symbol: x"), ModuleNotFoundError("No module named 'torchaudio'")]
)
def test_which_torchaudio_fits_is_said_where_it_cannot_be_imported(
    tmp_path, monkeypatch, torch_version, wanted, error
):
    class Broken:  # finds torchaudio first, and fails as its import does
        @staticmethod
        def find_spec(name, *_):
            if name.split(".")[0] == "torchaudio":
                raise error

    for name in [name for name in sys.modules if name.split(".")[0] == "torchaudio"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Broken, *sys.meta_path])
    monkeypatch.setattr(helpers.torch, "__version__", torch_version)
    with pytest.raises(
        RunError,
        match=rf'torch {re.escape(torch_version)} .*pip install "torchaudio=={wanted}\.\*"',
    ):
        helpers.make_practice_corpus(tmp_path / "corpus", (1, 1, 1))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_training_on_data_that_are_there_does_without_torchaudio(corpus):
    code = (
        "import sys; sys.modules['torchaudio'] = None; import helpers; "
        f"helpers.warp_maps(0.2, helpers.AudioDataset({str(corpus)!r}, 'dev-clean'))"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
