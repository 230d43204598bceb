"""LibriSpeech with its phones' times as a corpus: from parquet of synthetic speech, by the dataset's schema."""

import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from notebook import ROOT, TINY, run_cells
from reference import labels_at_centres

import helpers
from helpers import DataError, RunError, make_librispeech_corpus

pytest.importorskip("datasets")
pq, pa, soundfile = (pytest.importorskip(name) for name in ("pyarrow.parquet", "pyarrow", "soundfile"))
SPANS = pa.list_(pa.struct([("phoneme", pa.string()), ("start", pa.float64()), ("end", pa.float64())]))
SCHEMA = pa.schema([("id", pa.string()), ("sex", pa.string()), ("subset", pa.string()),
                    ("audio", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
                    ("transcript", pa.string()), ("phonemes", SPANS)])
RATE = 16000
SEVEN = [("sil", 0.0, 0.3), ("AA1", 0.3, 0.5), ("T", 0.5, 0.6), ("spn", 0.6, 0.8), ("UW0", 0.9, 1.1), ("NG", 1.1, 1.2),
         ("", 1.2, 1.4)]


def row(name, spans=SEVEN, seconds=1.4, rate=RATE, audio=None):
    if audio is None:
        file = io.BytesIO()
        noise = np.random.default_rng(sum(name.encode())).normal(0, 0.1, int(seconds * rate))
        soundfile.write(file, noise, rate, format="FLAC")
        audio = file.getvalue()
    spans = spans and [dict(zip(("phoneme", "start", "end"), span)) for span in spans]
    return {"id": name, "sex": "", "subset": "x", "audio": {"bytes": audio, "path": f"{name}.flac"}, "transcript": "",
            "phonemes": spans}


def write(path, rows, schema=SCHEMA):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema), path, row_group_size=3)
    return path


def spoken(count):
    """Rows of synthetic speech, with the phones and times that the synthesiser reports."""
    rows = []
    for i in range(count):
        samples, phones = helpers.speak(*helpers.practice_utterance(0, i))
        file = io.BytesIO()
        soundfile.write(file, samples, helpers.ESPEAK_RATE, format="FLAC")
        spans = [(phone.replace("[SIL]", "sil"), start, end) for phone, start, end in phones]
        rows.append(row(f"{i}-1-0000", spans, audio=file.getvalue()))
    return rows


def copy_of_the_hub(folder, train, dev=None, test=None):
    """Write shards as the dataset on the hub has them; by default dev and test have a row each."""
    parts = {"train_clean_100": train, "dev_clean": dev or [[row("1-0")]], "test_clean": test or [[row("2-0")]]}
    for name, shards in parts.items():
        for i, rows in enumerate(shards):
            write(folder / "data" / f"{name}-{i:05d}-of-{len(shards):05d}.parquet", rows)
    return folder


@pytest.fixture(scope="module")
def speech(tmp_path_factory):
    rows = spoken(10)
    return copy_of_the_hub(tmp_path_factory.mktemp("speech"), [rows[:4], rows[4:6]], [rows[6:8]], [rows[8:]])


@pytest.fixture(scope="module")
def corpus(speech, tmp_path_factory):
    root = tmp_path_factory.mktemp("converted") / "librispeech"
    make_librispeech_corpus(root, speech)
    return root


def contents(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def slow_labels(spans, frames):
    silent = ("sil", "sp", "spn", "", None)
    phones = [("[SIL]" if phone in silent else phone.strip("012"), *times) for phone, *times in spans]
    return labels_at_centres(phones, frames)


def test_each_utterance_lies_in_its_partition_with_the_phones_at_its_frames(corpus, speech):
    expected = {"train-clean-100": 6, "dev-clean": 2, "test-clean": 2}
    assert {name: len(list((corpus / name / "mfcc").iterdir())) for name in expected} == expected
    assert not (corpus / "test-clean" / "transcript").exists()
    answers, frames = [], 0
    for file in sorted(speech.rglob("*.parquet")):
        for utterance in pq.read_table(file).to_pylist():
            [path] = corpus.glob(f"*/mfcc/{utterance['id']}.npy")
            assert path.parts[-3].replace("-", "_") in file.name
            mfcc = np.load(path)
            audio, rate = soundfile.read(io.BytesIO(utterance["audio"]["bytes"]), dtype="float32")
            assert np.array_equal(mfcc, helpers.speech_features(audio, rate)) and mfcc.dtype == np.float32
            assert abs(len(mfcc) - len(audio) / rate * 100) < 4
            labels = slow_labels([tuple(phone.values()) for phone in utterance["phonemes"]], len(mfcc))
            if "test" in file.name:
                answers += labels
            else:
                transcript = np.load(path.parents[1] / "transcript" / path.name)
                assert transcript.tolist() == ["[SOS]", *labels, "[EOS]"] and len(set(labels)) > 5
            frames += len(mfcc)
    assert helpers.read_submission(corpus / "answers.csv").tolist() == answers
    assert sum(len(helpers.AudioDataset(corpus, name)) for name in helpers.PARTITIONS) == frames


def test_symbols_gaps_overlaps_and_stress_are_read(tmp_path, capsys):
    overlapping = [("K", 0.5, 1.0), ("AA1", 0.1, 0.6), ("", 1.0, 1.4)]  # and in another order
    make_librispeech_corpus(tmp_path / "a", copy_of_the_hub(tmp_path / "hub", [[row("3-0"), row("4-0", overlapping)]]))
    assert "4 utterances; 0 left out" in capsys.readouterr().out
    for name, spans in (("3-0", SEVEN), ("4-0", sorted(overlapping, key=lambda span: span[1]))):
        labels = np.load(tmp_path / "a" / "train-clean-100" / "transcript" / f"{name}.npy")[1:-1]
        assert labels.tolist() == slow_labels(spans, len(labels)) and len(labels) == 137
    assert set(labels) == {"[SIL]", "AA", "K"}


def test_what_is_left_out_and_unknown_words_are_counted(tmp_path, capsys):
    rows = [row(f"{i}-0") for i in range(3, 6)]
    rows += [row("none-0", None), row("empty-0", []), row("short-0", seconds=2.0), row("enough-0", seconds=1.85)]
    make_librispeech_corpus(tmp_path / "a", copy_of_the_hub(tmp_path / "hub", [rows]))
    assert "6 utterances; 3 left out" in (printed := capsys.readouterr().out) and "6 unknown words" in printed
    assert (tmp_path / "a" / "left-out.txt").read_text().splitlines() == [
        "empty-0: no alignment", "none-0: no alignment", "short-0: its phones end 0.60 s before the audio"]
    assert not list((tmp_path / "a").rglob("short-0.npy"))


def test_other_rates_give_as_many_frames(tmp_path):
    rows = [row("3-0", rate=8000), row("4-0"), row("5-0", rate=22050)]
    make_librispeech_corpus(tmp_path / "a", copy_of_the_hub(tmp_path / "hub", [rows]))
    assert len({len(np.load(path)) for path in (tmp_path / "a").rglob("transcript/*.npy")}) == 1


BAD = {"an unknown phone": (row("0-0", [("QQ", 0.0, 1.4)]), "0-0: unknown phones ['QQ']; expected [SIL] AA"),
       "no audio": (row("0-0", audio=b"nothing"), "0-0: the audio cannot be decoded"),
       "a path for an id": (row("../0"), "no name of a file")}


@pytest.mark.parametrize("bad, words", BAD.values(), ids=BAD)
def test_bad_rows_are_named(tmp_path, bad, words):
    with pytest.raises(DataError) as caught:
        make_librispeech_corpus(tmp_path / "a", copy_of_the_hub(tmp_path / "hub", [[row("3-0"), bad]]))
    assert words in str(caught.value) and not (tmp_path / "a").exists()


def damage(file):
    file.write_bytes(b"PAR1 and so on")


def take_columns(file):
    pq.write_table(pa.table({"id": ["a"]}), file)


@pytest.mark.parametrize("fault", [damage, take_columns, lambda file: file.unlink()])
def test_bad_sources_are_named(tmp_path, fault):
    hub = copy_of_the_hub(tmp_path / "hub", [[row("3-0")]])
    fault(hub / "data" / "dev_clean-00000-of-00001.parquet")
    with pytest.raises(RunError, match=re.escape(str(hub)) + ".*Expected LibriSpeech alignments .*run again"):
        make_librispeech_corpus(tmp_path / "a", hub)
    assert not (tmp_path / "a").exists()


class Hub:
    """A stream of the hub's that breaks off after a few rows, unless told otherwise."""

    def __init__(self, rows, fails_after=None):
        self.rows, self.fails_after, self.num_shards = rows, fails_after, 1

    def shard(self, num_shards, index):
        return self

    def select_columns(self, names):
        return self

    def cast_column(self, name, feature):
        return self

    def __iter__(self):
        for i, each in enumerate(self.rows):
            if i == self.fails_after:
                raise ConnectionError("the line is dead")
            yield each


def test_a_network_that_fails_keeps_what_is_there(tmp_path, monkeypatch):
    import datasets
    rows = {name: [row(f"{name}-{i}") for i in range(4)] for name in ("train_clean_100", "dev_clean", "test_clean")}

    def load(source, split, streaming, fails=()):
        assert source == helpers.LIBRISPEECH and streaming
        return Hub(rows[split], 2 if split in fails else None)

    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: load(*a, **k, fails=("dev_clean",)))
    with pytest.raises(RunError, match="(?s)line is dead.*connection.*needs 5,600 MB, .* MB are free.*run again"):
        make_librispeech_corpus(tmp_path / "a")
    assert len(list((tmp_path / "a.partial").rglob("train*.npy"))) == 8  # features and labels of four

    rows["train_clean_100"] = None  # a finished shard is not fetched again
    monkeypatch.setattr(datasets, "load_dataset", load)
    make_librispeech_corpus(tmp_path / "a")
    assert len(list((tmp_path / "a").rglob("*.npy"))) == 20

    def unreachable(*args, **kwargs):
        raise ConnectionError("no such host")
    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(RunError, match="no such host.*Check the connection"):
        make_librispeech_corpus(tmp_path / "b")


def test_a_full_disk_is_told_with_what_is_needed(tmp_path, monkeypatch):
    hub = copy_of_the_hub(tmp_path / "hub", [[row(f"{i}-0") for i in range(3, 8)]])
    with monkeypatch.context() as patch:
        save = np.save

        def full(path, array):
            if path.name == "5-0.npy":
                raise OSError(28, "No space left on device")
            save(path, array)
        patch.setattr(np, "save", full)
        with pytest.raises(RunError, match="(?s)No space left.*needs 5,600 MB, [\\d,]+ MB are free.*kept in"):
            make_librispeech_corpus(tmp_path / "a", hub)
    make_librispeech_corpus(tmp_path / "a", hub)
    assert len(list((tmp_path / "a" / "train-clean-100").rglob("*.npy"))) == 10


CONVERT = "import helpers, sys; helpers.make_librispeech_corpus(sys.argv[1], sys.argv[2])"


def test_killed_at_random_moments_it_ends_with_the_same_bytes(speech, corpus, tmp_path):
    kills, draw = 0, random.Random()
    while not (tmp_path / "librispeech").exists():
        child = subprocess.Popen([sys.executable, "-c", CONVERT, tmp_path / "librispeech", speech],
                                 stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)})
        try:
            _, errors = child.communicate(timeout=draw.uniform(2, 6) if kills < 4 else 120)
            assert child.returncode == 0, errors.decode()
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGKILL)
            child.communicate()
            kills += 1
            time.sleep(0.1)
    assert contents(tmp_path / "librispeech") == contents(corpus)
    assert [len(json.loads((corpus / f"train-clean-100-{i}.json").read_text())) for i in (0, 1)] == [4, 2]


def test_the_notebook_trains_on_it_and_scores_itself(corpus, tmp_path, capsys):
    run_cells({**TINY, "epochs": 1}, "table = wandb.Table(", tmp_path, corpus)
    printed = capsys.readouterr().out
    predictions = helpers.read_submission(tmp_path / "pencil" / "submission.csv")
    accuracy = (predictions == helpers.read_submission(corpus / "answers.csv")).mean()
    assert f"{accuracy:.2%} of the test frames right" in printed and "PRACTICE" not in printed
