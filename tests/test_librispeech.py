"""LibriSpeech as a corpus, made from parquet of synthetic speech in the dataset's schema."""

import io
import json
from unittest.mock import Mock

import numpy as np
import pytest
from support import kills
from support.configs import TINY
from support.librispeech import (
    RATE,
    SCHEMA,
    SEVEN,
    SPANS,
    datasets,
    flac,
    pa,
    pq,
    row,
    soundfile,
    spoken,
    write,
)
from support.notebook import LAST, run_cells
from support.reference import contents, labels_at_centres

import helpers
from helpers import DataError, RunError, make_librispeech_corpus


@pytest.fixture(scope="module")
def speech(tmp_path_factory):
    """A folder of shards named as those of the hub, of ten utterances."""
    folder, rows = tmp_path_factory.mktemp("speech"), spoken(10)
    for name, part in (
        ("train_clean_100-00000-of-00002", rows[:4]),
        ("train_clean_100-00001-of-00002", rows[4:6]),
        ("dev_clean-00000-of-00001", rows[6:8]),
        ("test_clean-00000-of-00001", rows[8:]),
    ):
        write(folder / f"{name}.parquet", part)
    return folder


@pytest.fixture(scope="module")
def corpus(speech, tmp_path_factory):
    root = tmp_path_factory.mktemp("converted") / "librispeech"
    make_librispeech_corpus(root, speech)
    return root


def slow_labels(spans, frames):
    silent = ("sil", "sp", "spn", "", None)
    phones = [
        ("[SIL]" if phone in silent else phone.strip("012"), *times) for phone, *times in spans
    ]
    return labels_at_centres(phones, frames)


def test_each_utterance_lies_in_its_partition_with_the_phones_at_its_frames(corpus, speech):
    expected = {"train-clean-100": 6, "dev-clean": 2, "test-clean": 2}
    assert {name: len(list((corpus / name / "mfcc").iterdir())) for name in expected} == expected
    assert not (corpus / "test-clean" / "transcript").exists()
    answers, frames = [], 0
    for file in sorted(speech.iterdir()):
        for utterance in pq.read_table(file).to_pylist():
            [path] = corpus.glob(f"*/mfcc/{utterance['id']}.npy")
            assert path.parts[-3].replace("-", "_") in file.name
            mfcc = np.load(path)
            audio, rate = soundfile.read(io.BytesIO(utterance["audio"]["bytes"]), dtype="float32")
            assert (
                np.array_equal(mfcc, helpers.speech_features(audio, rate))
                and mfcc.dtype == np.float32
            )
            assert abs(len(mfcc) - len(audio) / rate * 100) < 4
            labels = slow_labels(
                [tuple(phone.values()) for phone in utterance["phonemes"]], len(mfcc)
            )
            if "test" in file.name:
                answers += labels
            else:
                transcript = np.load(path.parents[1] / "transcript" / path.name)
                assert transcript.tolist() == ["[SOS]", *labels, "[EOS]"] and len(set(labels)) > 5
            frames += len(mfcc)
    assert helpers.read_submission(corpus / "answers.csv").tolist() == answers
    assert sum(len(helpers.AudioDataset(corpus, name)) for name in helpers.PARTITIONS) == frames


def test_a_lone_file_is_dealt_out_and_symbols_gaps_and_stress_are_read(tmp_path, capsys):
    make_librispeech_corpus(
        tmp_path / "a", write(tmp_path / "x.parquet", [row(f"{i}-0") for i in range(6)])
    )
    assert "6 utterances; 0 left out" in capsys.readouterr().out
    names = [
        sorted(path.stem for path in (tmp_path / "a" / name / "mfcc").iterdir())
        for name in helpers.PARTITIONS
    ]
    assert names == [["0-0", "1-0", "2-0", "5-0"], ["3-0"], ["4-0"]]
    labels = np.load(tmp_path / "a" / "dev-clean" / "transcript" / "3-0.npy")[1:-1]
    assert labels.tolist() == slow_labels(SEVEN, len(labels)) and len(labels) == 138
    assert set(labels) == {"[SIL]", "AA", "T", "UW", "NG"}


def test_overlaps_and_phones_in_another_order_are_read(tmp_path):
    spans = [("K", 0.5, 1.0), ("AA1", 0.1, 0.6), ("", 1.0, 1.4)]
    make_librispeech_corpus(
        tmp_path / "a", write(tmp_path / "x.parquet", [row(f"{i}-0", spans) for i in range(5)])
    )
    labels = np.load(tmp_path / "a" / "dev-clean" / "transcript" / "3-0.npy")[1:-1]
    assert labels.tolist() == slow_labels(sorted(spans, key=lambda span: span[1]), len(labels))
    assert set(labels) == {"[SIL]", "AA", "K"}


def test_what_is_left_out_and_unknown_words_are_counted(tmp_path, capsys):
    rows = [row(f"{i}-0") for i in range(5)]
    rows += [
        row("none-0", None, seconds=0.004),
        row("empty-0", []),
        row("short-0", seconds=2.0),
        row("enough-0", seconds=1.85),
        row("ms-0", [("AA", 0, 1400.0)]),
    ]
    make_librispeech_corpus(tmp_path / "a", write(tmp_path / "x.parquet", rows))
    assert (
        "6 utterances; 4 left out" in (printed := capsys.readouterr().out)
        and "6 unknown words" in printed
    )
    assert (tmp_path / "a" / "left-out.txt").read_text().splitlines() == [
        "empty-0: no alignment",
        "ms-0: its phones end 1398.60 s after the audio",
        "none-0: no alignment",
        "short-0: its phones end 0.60 s before the audio",
    ]
    assert not list((tmp_path / "a").rglob("short-0.npy"))


def test_where_all_utterances_are_left_out_the_reasons_are_named(tmp_path):
    silent_end = [row(f"{i}-0", seconds=2.25) for i in range(12)]
    with pytest.raises(DataError) as error:
        make_librispeech_corpus(tmp_path / "a", write(tmp_path / "x.parquet", silent_end))
    lines = str(error.value).splitlines()
    assert "no utterances for train-clean-100" in lines[0]
    assert lines[1] == "left out: 0-0: its phones end 0.85 s before the audio"
    assert len(lines) == 12 and lines[-1] == "... and 2 more"


def test_other_rates_and_the_lists_that_older_versions_write(tmp_path):
    rows = [row(f"{i}-0", rate=8000 if i == 1 else RATE) for i in range(5)]
    make_librispeech_corpus(tmp_path / "new", write(tmp_path / "new.parquet", rows))
    lists = pa.struct([(field.name, pa.list_(field.type)) for field in SPANS.value_type])
    for each in rows:
        each["phonemes"] = {
            field.name: [phone[field.name] for phone in each["phonemes"]] for field in lists
        }
    write(
        tmp_path / "old.parquet",
        rows,
        SCHEMA.set(SCHEMA.get_field_index("phonemes"), pa.field("phonemes", lists)),
    )
    make_librispeech_corpus(tmp_path / "old", tmp_path / "old.parquet")
    files = [
        {path: data for path, data in contents(tmp_path / name).items() if path.endswith("npy")}
        for name in ("new", "old")
    ]
    assert files[0] == files[1] and len(files[0]) == 9
    lengths = {len(np.load(path)) for path in (tmp_path / "new").rglob("transcript/*.npy")}
    assert len(lengths) == 1


BAD = {
    "an unknown phone": (
        row("0-0", [("QQ", 0.0, 1.4)]),
        "0-0: the phone 'QQ' at 0.00 s is unknown; expected AA",
    ),
    "a phone that never ends": (
        row("0-0", [("AA", 0.0, None)]),
        "0-0: a phone without start or end; expected both",
    ),
    "no audio": (row("0-0", audio=b"nothing"), "0-0: the audio cannot be decoded"),
    "stereo": (
        row("0-0", audio=flac(np.zeros((RATE, 2)))),
        "0-0: the audio has 2 channels; expected one",
    ),
    "100 samples": (
        row("0-0", audio=flac(np.zeros(100))),
        "0-0: the audio has 100 samples at 16000 Hz, too few for a frame; expected at least 400",
    ),
    "too short at 8 kHz": (
        row("0-0", audio=flac(np.zeros(199), 8000)),
        "for a frame; expected at least 200",
    ),
    "the same id twice": (row("1-0"), "1-0: this id is there twice; expected each once"),
    "no id": (dict(row("0-0"), id=None), "the id None is no name of a file"),
    "a long id": (row("0" * 300), "no name of a file"),
    "a path for an id": (row("../0"), "no name of a file"),
}


@pytest.mark.parametrize("bad, words", BAD.values(), ids=BAD)
def test_bad_rows_are_named(tmp_path, bad, words):
    with pytest.raises(DataError) as caught:
        make_librispeech_corpus(tmp_path / "a", write(tmp_path / "x.parquet", [row("1-0"), bad]))
    assert str(caught.value).startswith(f"{tmp_path / 'x.parquet'}: ") and words in str(
        caught.value
    )
    assert not (tmp_path / "a").exists()


def test_the_shortest_utterance_has_one_frame(tmp_path):
    rows = [row(f"{i}-0", [("AA", 0.0, 0.025)], audio=flac(np.ones(400) / 2)) for i in range(5)]
    make_librispeech_corpus(tmp_path / "a", write(tmp_path / "x.parquet", rows))
    assert np.load(tmp_path / "a" / "dev-clean" / "transcript" / "3-0.npy").tolist() == [
        "[SOS]",
        "AA",
        "[EOS]",
    ]


def test_the_same_id_in_two_files_is_named_and_once_mended_nothing_of_the_old_files_is_left(
    tmp_path,
):
    files = {
        name: [row(f"{name}-{i}") for i in range(2)]
        for name in ("dev_clean", "test_clean", "train_clean_100")
    }
    files["train_clean_100"].append(row("dev_clean-0"))

    def rewrite():
        for name, rows in files.items():
            write(tmp_path / "x" / f"{name}.parquet", rows)

    rewrite()
    with pytest.raises(
        DataError, match="train_clean_100.parquet: dev_clean-0: this id is there twice"
    ):
        make_librispeech_corpus(tmp_path / "a", tmp_path / "x")
    assert list((tmp_path / "a.partial" / "dev-clean").rglob("dev_clean-0.npy"))
    del files["dev_clean"][0]
    rewrite()
    make_librispeech_corpus(tmp_path / "a", tmp_path / "x")
    assert not list((tmp_path / "a" / "dev-clean").rglob("dev_clean-0.npy"))
    assert len(list((tmp_path / "a").rglob("mfcc/*.npy"))) == 6


def test_what_systems_and_editors_leave_is_not_read(tmp_path, speech, corpus):
    for name in (
        "._train_clean_100-00000-of-00002.parquet",
        "__MACOSX/dev_clean.parquet",
        ".ipynb_checkpoints/dev_clean.parquet",
        "~test_clean.parquet",
        "old~/test_clean.parquet",
    ):
        path = tmp_path / "x" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"\0\5\x16\7")
    with pytest.raises(DataError, match="x: there are no .parquet files"):
        make_librispeech_corpus(tmp_path / "a", tmp_path / "x")
    for path in speech.iterdir():
        (tmp_path / "x" / path.name).symlink_to(path)
    make_librispeech_corpus(tmp_path / "a", tmp_path / "x")
    assert [
        len(list((tmp_path / "a" / name / "mfcc").iterdir())) for name in helpers.PARTITIONS
    ] == [6, 2, 2]
    assert (tmp_path / "a" / "answers.csv").read_bytes() == (corpus / "answers.csv").read_bytes()


def test_bad_sources_are_named(tmp_path):
    with pytest.raises(DataError, match="no such file or folder"):
        make_librispeech_corpus(tmp_path / "a", tmp_path / "nowhere.parquet")
    (tmp_path / "x.parquet").write_bytes(b"PAR1 and so on")
    with pytest.raises(DataError, match="x.parquet: unreadable parquet"):
        make_librispeech_corpus(tmp_path / "a", tmp_path / "x.parquet")
    pq.write_table(pa.table({"id": ["a"]}), tmp_path / "y.parquet")
    with pytest.raises(DataError, match="y.parquet: .*expected LibriSpeech alignments"):
        make_librispeech_corpus(tmp_path / "a", tmp_path / "y.parquet")
    with pytest.raises(DataError, match="no utterances for test-clean"):
        make_librispeech_corpus(
            tmp_path / "b", write(tmp_path / "z.parquet", [row(f"{i}") for i in range(4)])
        )
    (tmp_path / "c").mkdir()
    with pytest.raises(FileExistsError):
        make_librispeech_corpus(tmp_path / "c", tmp_path / "z.parquet")


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
    rows = {
        name: [row(f"{name}-{i}") for i in range(4)]
        for name in ("train_clean_100", "dev_clean", "test_clean")
    }

    def load(path, split, revision, streaming, fails=()):
        assert path == helpers.LIBRISPEECH and streaming
        return Hub(rows[split], 2 if split in fails else None)

    monkeypatch.setattr(
        datasets, "load_dataset", lambda *a, **k: load(*a, **k, fails=("dev_clean",))
    )
    with pytest.raises(
        RunError, match="(?s)line is dead.*Check the connection and run again.*needs about 5,600 MB"
    ):
        make_librispeech_corpus(tmp_path / "a")
    assert (
        len(list((tmp_path / "a.partial").rglob("train*.npy"))) == 8
    )  # features and labels of four

    rows["train_clean_100"] = None  # a finished shard is not fetched again
    monkeypatch.setattr(datasets, "load_dataset", load)
    make_librispeech_corpus(tmp_path / "a")
    assert len(list((tmp_path / "a").rglob("*.npy"))) == 20
    monkeypatch.setattr(datasets, "load_dataset", Mock(side_effect=ConnectionError("no such host")))
    with pytest.raises(RunError, match="no such host.*Check the connection"):
        make_librispeech_corpus(tmp_path / "b")


@pytest.mark.parametrize(
    "source, revision, expected",
    [
        (helpers.LIBRISPEECH, None, helpers.LIBRISPEECH_REVISION),
        (helpers.LIBRISPEECH, "main", "main"),
        ("somebody/speech", None, None),
        ("somebody/speech", "v2", "v2"),
    ],
)
def test_the_revision_reaches_the_hub(tmp_path, monkeypatch, source, revision, expected):
    asked = []

    def load(path, split, revision, streaming):
        asked.append((path, split, revision))
        return Hub([row(f"{split}-{i}") for i in range(2)])

    monkeypatch.setattr(datasets, "load_dataset", load)
    make_librispeech_corpus(tmp_path / "a", source, revision)
    assert asked == [
        (source, split, expected) for split in ("train_clean_100", "dev_clean", "test_clean")
    ]


def test_what_is_there_of_another_revision_is_fetched_again(tmp_path, monkeypatch):
    fails, asked = ["dev_clean"], []

    def load(path, split, revision, streaming):
        asked.append((split, revision))
        return Hub(
            [row(f"{split}-{revision}-{i}") for i in range(2)], 0 if split in fails else None
        )

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(RunError, match="line is dead"):
        make_librispeech_corpus(tmp_path / "a", revision="old")
    fails.clear()
    make_librispeech_corpus(tmp_path / "a", revision="new")
    assert len(list((tmp_path / "a").rglob("*new*.npy"))) == 10 and not list(
        (tmp_path / "a").rglob("*old*.npy")
    )


def test_a_full_disk_is_reported_with_what_is_needed(tmp_path, monkeypatch):
    save = np.save

    def full(path, array):
        if path.name == "3.npy":
            raise OSError(28, "No space left on device")
        save(path, array)

    source = write(tmp_path / "x.parquet", [row(f"{i}") for i in range(5)])
    with monkeypatch.context() as patch:
        patch.setattr(np, "save", full)
        with pytest.raises(
            RunError, match="(?s)No space left.*needs about [\\d,]+ MB; [\\d,]+ MB are there, kept"
        ):
            make_librispeech_corpus(tmp_path / "a", source)
    make_librispeech_corpus(tmp_path / "a", source)
    assert len(list((tmp_path / "a").rglob("*.npy"))) == 9


def convert(report, root, source):
    report.send("begun")
    make_librispeech_corpus(root, source)


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_bytes(speech, corpus, tmp_path, draw):
    killed = 0
    while not (tmp_path / "librispeech").exists():
        child, received = kills.start_reporting(convert, tmp_path / "librispeech", speech)
        received.recv()
        # the first time at once, so that even the fastest machine is killed
        child.join(draw.uniform(0, 0.1 * killed) if killed < 4 else 120)
        if child.exitcode is None:
            child.kill()
            child.join()
            killed += 1
            assert killed <= 4, "it does not come to its end in two minutes"
        else:
            assert child.exitcode == 0
    assert killed
    assert contents(tmp_path / "librispeech") == contents(corpus)
    assert len(json.loads(contents(corpus)["000-000.json"])) == 2


@pytest.mark.slow
def test_the_notebook_trains_on_it_and_scores_itself(corpus, tmp_path, capsys):
    run_cells({**TINY, "epochs": 1}, LAST, tmp_path, corpus)
    printed = capsys.readouterr().out
    predictions = helpers.read_submission(tmp_path / "pencil" / "submission.csv")
    accuracy = (predictions == helpers.read_submission(corpus / "answers.csv")).mean()
    assert f"{accuracy:.2%} of the test frames right" in printed and "PRACTICE" not in printed
