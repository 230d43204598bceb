"""The practice corpus: layout, labels, the same bytes on every run (offline; needs espeakng-loader)."""

import csv
import itertools
import random
import subprocess
import sys

import numpy as np
import pytest

import helpers
from helpers import ARPABET, GRAMMAR, PANGRAMS, PARTITIONS, PHONEMES, DataError

PHONES = set(PHONEMES[1:40])
UTTERANCES = (24, 4, 3)  # of the fixture `corpus`


def answers_of(root):
    with open(root / "answers.csv", newline="") as file:
        return list(csv.reader(file))


def transcripts(root, partition):
    paths = sorted((root / PARTITIONS[partition] / "transcript").iterdir())
    return [np.load(path)[1:-1] for path in paths]


def test_layout_is_the_courses(corpus):
    folders = {str(path.relative_to(corpus)) for path in corpus.rglob("*") if path.is_dir()}
    assert folders == {*PARTITIONS, *(f"{name}/mfcc" for name in PARTITIONS),
                       "train-clean-100/transcript", "dev-clean/transcript"}
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


def test_every_partition_has_all_the_phones(corpus):
    assert set(np.concatenate(transcripts(corpus, 0))) == PHONES | {"[SIL]"}
    assert set(np.concatenate(transcripts(corpus, 1))) == PHONES | {"[SIL]"}
    assert {label for _, label in answers_of(corpus)[1:]} == PHONES | {"[SIL]"}


def check_labels(labels, partition, index):
    """Say the utterance anew: its labels must fit, behind some silence, whose length follows from the first phone."""
    script = helpers.practice_script(partition, index)
    audio, events = helpers.speak(script["text"], script["voice"], script["rate"], script["pitch"])
    begins = next(start for start, mnemonic in events if not mnemonic.startswith("_"))
    silent = next(t for t, label in enumerate(labels) if label != "[SIL]")
    latest = int((silent * 160 + 256) * helpers.ESPEAK_RATE / 16000) - begins  # the centre of that frame's window
    before = next((shift for shift in range(latest, latest - 222, -1) if labels == helpers.frame_labels(
        [(start + shift, mnemonic) for start, mnemonic in [*events, (len(audio), "_")]], len(labels))), None)
    assert before is not None, "no shift makes the labels fit"
    after = (len(labels) * 160 + 352) * helpers.ESPEAK_RATE / 16000 - before - len(audio)
    assert 1 / 8 - 0.01 < before / helpers.ESPEAK_RATE < 1 / 2 + 0.01
    assert 1 / 8 - 0.02 < after / helpers.ESPEAK_RATE < 1 / 2 + 0.01


def test_answers_are_the_test_frames_in_the_order_of_the_files(corpus):
    rows = answers_of(corpus)
    assert rows[0] == ["id", "label"]
    assert [int(row[0]) for row in rows[1:]] == list(range(len(rows) - 1))
    labels = [row[1] for row in rows[1:]]
    for index, path in enumerate(sorted((corpus / "test-clean" / "mfcc").iterdir())):
        length = len(np.load(path))
        check_labels(labels[:length], 2, index)
        labels = labels[length:]
    assert not labels


def test_transcripts_are_what_is_said_between_two_silences(corpus):
    for partition in (0, 1):
        for index, labels in enumerate(transcripts(corpus, partition)):
            check_labels(labels.tolist(), partition, index)
            assert set(labels[:11]) == set(labels[-11:]) == {"[SIL]"}


def test_partitions_share_no_sentence_and_no_voice():
    scripts = [[helpers.practice_script(p, i) for i in range(2000)] for p in range(3)]
    sentences = [[script["text"] for script in part] for part in scripts]
    everything = list(itertools.chain(*sentences))
    assert len(set(everything)) == len(everything)  # so none is shared, and none comes twice
    assert [sentences[p][0] for p in range(3)] == PANGRAMS
    voices = [{script["voice"] for script in part} for part in scripts]
    assert sum(map(len, voices)) == len(set().union(*voices)) == len(helpers.practice_voices())


def test_bytes_do_not_depend_on_the_number_of_processes(corpus, tmp_path):
    helpers.make_practice_corpus(tmp_path / "again", UTTERANCES, processes=1)
    paths = sorted(path.relative_to(corpus) for path in corpus.rglob("*") if path.is_file())
    assert len(paths) == sum(UTTERANCES) + sum(UTTERANCES[:2]) + 1
    for path in paths:
        assert (corpus / path).read_bytes() == (tmp_path / "again" / path).read_bytes(), path


def test_speech_does_not_depend_on_what_was_said_before():
    scripts = [helpers.practice_script(0, i) for i in range(60)]
    first, again = {}, {}
    for heard, order in (first, range(60)), (again, random.Random(1).sample(range(60), 60)):
        for i in order:
            script = scripts[i]
            audio, events = helpers.speak(script["text"], script["voice"], script["rate"], script["pitch"])
            heard[i] = audio.tobytes(), events
    assert first == again


@pytest.mark.parametrize("voice", ["", "klatt4", "f1", "pedro"])
def test_the_whole_vocabulary_is_mapped(voice):
    # the sentences themselves too: a word may sound different beside others or at the end
    texts = [f"{entry}." for entries in GRAMMAR for entry in entries]
    texts += [*PANGRAMS, *(helpers.practice_script(0, i)["text"] for i in range(1, 200))]
    _, events = helpers.speak(" ".join(texts), voice, rate=400)
    mnemonics = {mnemonic for _, mnemonic in events if not mnemonic.startswith("_")}
    assert mnemonics <= set(ARPABET)
    assert {phone for m in mnemonics for phone in ARPABET[m].split("+")} == PHONES
    assert len({word for entries in GRAMMAR for entry in entries for word in entry.lower().split()}) >= 100


def test_an_unknown_mnemonic_is_refused():
    with pytest.raises(DataError, match="'x'"):
        helpers.frame_labels([(0, "h"), (300, "x"), (900, "_:")], 3)


def test_labels_split_r_coloured_vowels_and_take_the_centre_of_the_window():
    # A@ from 353 to 2353 samples at 22,050 Hz; window centres every 220.5 samples from 352.8
    labels = helpers.frame_labels([(353, "A@"), (2353, "_:")], 11)
    assert labels == ["[SIL]", *["AA"] * 4, *["R"] * 5, "[SIL]"]


def test_labels_fit_the_sound(corpus):
    scores = {}
    for shift in (0, 5, -5):
        silence, vowel, hiss = [], [], []
        for path in sorted((corpus / "dev-clean" / "mfcc").iterdir()):
            mfcc = np.load(path)
            labels = np.roll(np.load(corpus / "dev-clean" / "transcript" / path.name)[1:-1], shift)
            silence += [*mfcc[labels == "[SIL]", 0]]
            vowel += [*mfcc[np.isin(labels, ["AA", "AE", "AO", "IY", "EY", "OW"])]]
            hiss += [*mfcc[np.isin(labels, ["S", "Z", "SH"])]]
        # c0 is the log energy, c1 falls when the energy moves to the high frequencies
        scores[shift] = np.mean(vowel, 0)[0] - np.mean(silence), np.mean(vowel, 0)[1] - np.mean(hiss, 0)[1]
    assert scores[0][0] > 1.1 * max(scores[5][0], scores[-5][0])
    assert scores[0][1] > 1.5 * max(scores[5][1], scores[-5][1])


def test_silent_audio_has_finite_features():
    assert np.isfinite(helpers.speech_features(np.zeros(22050, np.float32), 22050)).all()


def test_an_interrupted_build_does_not_look_finished(tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    root = tmp_path / "corpus"
    with monkeypatch.context() as patch:
        patch.setattr(helpers, "tqdm", interrupt)
        with pytest.raises(KeyboardInterrupt):
            helpers.make_practice_corpus(root, (1, 1, 1), processes=1)
    assert not root.exists()
    (tmp_path / "corpus.partial" / "dev-clean" / "mfcc" / "stray.npy").touch()  # as a killed build leaves it
    helpers.make_practice_corpus(root, (1, 1, 1), processes=1)
    assert [path.name for path in root.rglob("*.npy")] == ["000000.npy"] * 5
    assert not (tmp_path / "corpus.partial").exists()
    with pytest.raises(FileExistsError, match="exists already"):
        helpers.make_practice_corpus(root, (1, 1, 1))


def test_a_script_that_makes_a_corpus_is_not_run_again_by_its_processes(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import helpers\nprint('started')\n"
                      "helpers.make_practice_corpus('corpus', (1, 1, 1), processes=2)\n")
    result = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=tmp_path, timeout=120,
                            env={**helpers.os.environ, "PYTHONPATH": str(helpers.Path(helpers.__file__).parent)})
    assert result.returncode == 0, result.stderr
    assert result.stdout == "started\n" and (tmp_path / "corpus" / "answers.csv").exists()


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
