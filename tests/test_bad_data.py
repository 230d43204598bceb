"""Damaged and incomplete data: every fault is a DataError that names the file and the fault."""

import collections
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.mutations import attempt, take_source, write
from support.reference import write_partition

import helpers
from helpers import AudioDataset, DataError

pytestmark = pytest.mark.filterwarnings("error")
LENGTHS = (6, 9, 7)


@pytest.fixture
def root(tmp_path):
    for partition in helpers.PARTITIONS:
        write_partition(tmp_path / "data", partition, LENGTHS)
    return tmp_path / "data"


def refusal(root, partition="dev-clean", **arguments):
    """The message of the DataError that loading must end in."""
    with pytest.raises(DataError) as caught:
        AudioDataset(root, partition, **arguments)
    assert type(caught.value) is DataError
    return str(caught.value)


def change(kind, function, **options):
    """A fault: the array of the second utterance's file goes through a function."""

    def damage(folder):
        path = folder / kind / "0001.npy"
        write(path, np.asarray(function(np.load(path))), **options)

    return damage


def change_bytes(kind, function):
    def damage(folder):
        path = folder / kind / "0001.npy"
        path.write_bytes(function(path.read_bytes()))

    return damage


def put(array, index, value):
    array[index] = value
    return array


def link_to_nowhere(path):
    path.unlink()
    path.symlink_to("nowhere.npy")


def make_folder(path):
    path.unlink()
    path.mkdir()


MFCC, TRANSCRIPT = "mfcc/0001.npy", "transcript/0001.npy"
FAULTS = {  # what: (damage to the partition's folder, file named, words of the message)
    # the array of the MFCCs
    "one frame too few": (
        change("mfcc", lambda a: a[:-1]),
        TRANSCRIPT,
        "9 phonemes; expected 8, one per frame",
    ),
    "one frame too many": (
        change("mfcc", lambda a: a[[0, *range(9)]]),
        TRANSCRIPT,
        "9 phonemes; expected 10",
    ),
    "no frames": (
        change("mfcc", lambda a: a[:0]),
        MFCC,
        r"shape \(0, 28\); expected \(frames, 28\) with at least",
    ),
    "27 coefficients": (
        change("mfcc", lambda a: a[:, :27]),
        MFCC,
        r"shape \(9, 27\); expected \(frames, 28\)",
    ),
    "29 coefficients": (change("mfcc", lambda a: a[:, [0, *range(28)]]), MFCC, r"shape \(9, 29\)"),
    "transposed": (change("mfcc", lambda a: a.T), MFCC, r"shape \(28, 9\)"),
    "1-d": (change("mfcc", lambda a: a.ravel()), MFCC, r"shape \(252,\)"),
    "3-d": (change("mfcc", lambda a: a[None]), MFCC, r"shape \(1, 9, 28\)"),
    "0-d": (change("mfcc", lambda a: a[0, 0]), MFCC, r"shape \(\)"),
    "NaN": (change("mfcc", lambda a: put(a, (3, 5), np.nan)), MFCC, "NaN, infinite"),
    "infinity": (change("mfcc", lambda a: put(a, (0, 0), np.inf)), MFCC, "infinite"),
    "minus infinity": (change("mfcc", lambda a: put(a, (8, 27), -np.inf)), MFCC, "infinite"),
    "all NaN": (change("mfcc", lambda a: a * np.float32(np.nan)), MFCC, "NaN"),
    "1e300": (
        change("mfcc", lambda a: put(a.astype(float), (3, 5), 1e300)),
        MFCC,
        "absurdly large",
    ),
    "1e308 and its opposite": (
        change("mfcc", lambda a: put(a.astype(float), np.s_[:2, 5], [1e308, -1e308])),
        MFCC,
        "absurdly large",
    ),
    **{
        f"dtype {dtype}": (
            change("mfcc", lambda a, dtype=dtype: a.real.astype(dtype)),
            MFCC,
            "dtype .*expected float32",
        )
        for dtype in ("i4", "u1", "i8", "c8", "c16", "?", "S8", "U8", "M8[s]", "V4")
    },
    "structured": (
        change("mfcc", lambda a: a.view([("x", "f4")])),
        MFCC,
        "dtype .*expected float32",
    ),
    # the array of the transcript
    "one phoneme too few": (
        change("transcript", lambda a: np.delete(a, 3)),
        TRANSCRIPT,
        "8 phonemes; expected 9",
    ),
    "one phoneme too many": (
        change("transcript", lambda a: np.insert(a, 3, "AA")),
        TRANSCRIPT,
        "10 phonemes; expec",
    ),
    "no [SOS]": (
        change("transcript", lambda a: put(a, 0, "AA")),
        TRANSCRIPT,
        "starts with 'AA' .*expected .SOS.",
    ),
    "no [EOS]": (
        change("transcript", lambda a: put(a, -1, "AA")),
        TRANSCRIPT,
        "ends with 'AA'; expected .*EOS",
    ),
    "neither": (
        change("transcript", lambda a: a[1:-1]),
        TRANSCRIPT,
        r"expected \[SOS\] and \[EOS\]",
    ),
    "swapped": (
        change("transcript", lambda a: a[::-1]),
        TRANSCRIPT,
        r"starts with '\[EOS\]' and ends with '\[SOS\]'",
    ),
    "[SOS] inside": (
        change("transcript", lambda a: put(a, 4, "[SOS]")),
        TRANSCRIPT,
        r"'\[SOS\]' at frame 3 is not a",
    ),
    "[EOS] inside": (
        change("transcript", lambda a: put(a, 9, "[EOS]")),
        TRANSCRIPT,
        r"'\[EOS\]' at frame 8 is not a",
    ),
    "unknown phoneme": (
        change("transcript", lambda a: put(a, 4, "XX")),
        TRANSCRIPT,
        "'XX' at frame 3 is not a phon",
    ),
    "lower case": (
        change("transcript", lambda a: put(a, 1, "aa")),
        TRANSCRIPT,
        "'aa' at frame 0 is not a phoneme",
    ),
    "blank": (change("transcript", lambda a: put(a, 4, "AA ")), TRANSCRIPT, "'AA ' at frame 3"),
    "after the last": (
        change("transcript", lambda a: put(a, 4, "zz")),
        TRANSCRIPT,
        "'zz' at frame 3",
    ),
    "empty text": (
        change("transcript", lambda a: put(a, 4, "")),
        TRANSCRIPT,
        "'' at frame 3 is not a phoneme",
    ),
    "cut text": (change("transcript", lambda a: a.astype("<U2")), TRANSCRIPT, r"starts with '\[S'"),
    "text of no width": (change("transcript", lambda a: np.zeros(11, "<U0")), TRANSCRIPT, ""),
    "no Unicode": (
        change("transcript", lambda a: put(a.view(np.uint32).copy(), 22, 2**31).view("<U5")),
        TRANSCRIPT,
        "at frame 3 is not a phoneme|not in range",
    ),
    "markers only": (
        change("transcript", lambda a: a[[0, -1]]),
        TRANSCRIPT,
        r"shape \(2,\); expected \(frames \+ 2,",
    ),
    "transcript 2-d": (change("transcript", lambda a: a[None]), TRANSCRIPT, r"shape \(1, 11\)"),
    "bytes": (
        change("transcript", lambda a: a.astype("S5")),
        TRANSCRIPT,
        "dtype .S5; expected text",
    ),
    "numbers": (
        change("transcript", lambda a: np.arange(11)),
        TRANSCRIPT,
        "dtype int64; expected text",
    ),
    # the files
    **{
        f"{kind} {what}": (change_bytes(kind, function), f"{kind}/0001.npy", words)
        for kind in ("mfcc", "transcript")
        for what, function, words in (
            ("empty", lambda data: b"", "."),
            (
                "one byte short",
                lambda data: data[:-1],
                "EOF: reading array data.*expected one whole array",
            ),
            ("without content", lambda data: data[:128], "EOF: reading array data, .* got 0"),
            ("with half a header", lambda data: data[:64], "."),
            ("with an extra byte", lambda data: data + b"\0", "there is more in it"),
            ("twice", lambda data: data * 2, "there is more in it"),
            ("of zeros", lambda data: bytes(len(data)), "magic"),
            ("that is text", lambda data: b"<html>404 Not Found</html>", "magic"),
            ("that is a zip", lambda data: b"PK\3\4" + data, "magic"),
            ("of version 9", lambda data: data[:6] + b"\11" + data[7:], "version"),
            ("with a broken header", lambda data: data.replace(b"descr", b"dexcr"), "(?i)header"),
            (
                "with an unclosed header",
                lambda data: data.replace(b"}", b" "),
                "expected one whole array",
            ),
            ("with a foreign dtype", lambda data: re.sub(rb"<[fU]\d", b"<q9", data, count=1), "q9"),
            (
                "with a negative shape",
                lambda data: data.replace(b"(", b"(-", 1).replace(b" \n", b"\n", 1),
                ".",
            ),
            (
                "with a huge shape",
                lambda data: data.replace(b"(", b"(9999999", 1).replace(b" " * 7 + b"\n", b"\n"),
                "EOF: reading array data",
            ),
        )
    },
    **{
        f"{kind} pickled": (
            change(kind, lambda a: a.astype(object), allow_pickle=True),
            f"{kind}/0001.npy",
            "Object arrays cannot be loaded .*expected one whole array",
        )
        for kind in ("mfcc", "transcript")
    },
    **{
        f"{kind} a folder": (
            lambda folder, kind=kind: make_folder(folder / kind / "0001.npy"),
            f"{kind}/0001.npy",
            "directory|Permission",
        )
        for kind in ("mfcc", "transcript")
    },
    **{
        f"{kind} a link to nowhere": (
            lambda folder, kind=kind: link_to_nowhere(folder / kind / "0001.npy"),
            f"{kind}/0001.npy",
            "No such file",
        )
        for kind in ("mfcc", "transcript")
    },
    # the folders
    "no transcript": (
        lambda folder: (folder / TRANSCRIPT).unlink(),
        MFCC,
        "no transcript of the same name in",
    ),
    "no MFCCs": (
        lambda folder: (folder / MFCC).unlink(),
        TRANSCRIPT,
        "no MFCC file of the same name in",
    ),
    "partition missing": (shutil.rmtree, "mfcc", "no such folder; expected ROOT/"),
    "mfcc missing": (
        lambda folder: shutil.rmtree(folder / "mfcc"),
        "mfcc",
        "no such folder; expected ROOT/",
    ),
    "transcript missing": (
        lambda folder: shutil.rmtree(folder / "transcript"),
        "transcript",
        "no such folder",
    ),
    "mfcc empty": (
        lambda folder: [path.unlink() for path in (folder / "mfcc").iterdir()],
        "mfcc",
        "there are no .npy files in it; expected one for each utterance",
    ),
    "transcript empty": (
        lambda folder: [path.unlink() for path in (folder / "transcript").iterdir()],
        "mfcc/0002.npy",
        "no transcript of the same name",
    ),
    "mfcc a file": (
        lambda folder: (shutil.rmtree(folder / "mfcc"), (folder / "mfcc").touch()),
        "mfcc",
        "no such fold",
    ),
}


@pytest.mark.parametrize("damage, name, words", FAULTS.values(), ids=FAULTS)
def test_every_fault_is_reported_with_the_name_of_the_file(root, damage, name, words):
    damage(root / "dev-clean")
    message = refusal(root)
    assert str(root / "dev-clean" / name) in message
    assert re.search(words, message), message
    assert refusal(root, cache=root / "cache") == message
    AudioDataset(root, "train-clean-100")  # the others are unharmed
    AudioDataset(root, "test-clean")


@pytest.mark.parametrize(
    "what",
    [what for what, (_, name, _) in FAULTS.items() if name == MFCC and what != "no transcript"],
)
def test_faults_of_the_test_partition_are_reported_too(root, what):
    damage, name, words = FAULTS[what]
    damage(root / "test-clean")
    message = refusal(root, "test-clean")
    assert str(root / "test-clean" / name) in message and re.search(words, message)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mfcc", "transcript"])
def test_a_file_cut_after_any_byte(root, kind):
    path = root / "dev-clean" / kind / "0001.npy"
    whole = path.read_bytes()
    for size in {*range(0, 140), *range(140, len(whole), 13), len(whole) - 1}:
        path.write_bytes(whole[:size])
        assert str(path) in refusal(root)


def test_a_missing_root(tmp_path):
    for partition in helpers.PARTITIONS:
        assert str(tmp_path / "nowhere" / partition / "mfcc") in refusal(
            tmp_path / "nowhere", partition
        )


def test_a_subset_of_nothing(root):
    message = refusal(root, subset=0.3)
    assert (
        "dev-clean" in message
        and "subset 0.3 of its 3 utterances is none; expected at least one" in message
    )


def test_a_subset_is_judged_by_its_own_files(root):
    (root / "dev-clean" / "mfcc" / "0002.npy").write_bytes(b"")
    AudioDataset(root, "dev-clean", subset=0.7)
    assert "0002.npy" in refusal(root)


def test_strays_are_ignored_with_a_note(root, capsys):
    expected = AudioDataset(root, "dev-clean")
    capsys.readouterr()
    strays = [
        ".DS_Store",
        "._0001.npy",
        "~0001.npy",
        "notes.txt",
        "Thumbs.db",
        "0001.npy~",
        "#0001.npy#",
        "0001.npy.bak",
        "0001 (1).npy",
        "0001 copy.npy",
        "0001 - Copy.npy",
        "0001-Copy1.npy",
    ]
    for name in strays:
        (root / "dev-clean" / "mfcc" / name).write_bytes(b"\0")
    (root / "dev-clean" / "transcript" / "desktop.ini").touch()
    (root / "dev-clean" / "transcript" / ".ipynb_checkpoints").mkdir()
    (root / "dev-clean" / "transcript" / ".ipynb_checkpoints" / "0001-checkpoint.npy").touch()
    dataset = AudioDataset(root, "dev-clean")
    note = capsys.readouterr().out
    assert "dev-clean: ignored 12 file(s) in mfcc that are not utterances: " in note
    assert (
        "dev-clean: ignored 2 file(s) in transcript that are not utterances: "
        ".ipynb_checkpoints, desktop.ini" in note
    )
    assert all(name in note for name in sorted(strays)[:5])
    assert dataset.frames.equal(expected.frames) and dataset.labels.equal(expected.labels)
    AudioDataset(root, "train-clean-100")
    assert "ignored" not in capsys.readouterr().out


def test_names_with_a_blank_are_data_unless_their_original_is_there(root):
    for kind in ("mfcc", "transcript"):
        for i in range(2):
            (root / "dev-clean" / kind / f"000{i}.npy").rename(
                root / "dev-clean" / kind / f"take {i}.npy"
            )
    assert AudioDataset(root, "dev-clean").offsets.diff().tolist() == [
        7,
        6,
        9,
    ]  # 0002, take 0, take 1


@pytest.mark.skipif(os.name == "nt", reason="names are text there")
def test_names_that_are_no_text_can_be_printed(root, capsys):
    folder = os.fsencode(root / "dev-clean" / "mfcc")
    with open(folder + b"/\xff.txt", "wb"), open(folder + b"/\xfe.npy", "wb"):
        pass
    refusal(root, "dev-clean").encode()
    os.remove(folder + b"/\xfe.npy")
    AudioDataset(root, "dev-clean")
    assert "dcff" in capsys.readouterr().out


@pytest.mark.parametrize("faults", [2, 10, 11, 12])
def test_all_faults_are_reported_together(tmp_path, faults):
    folder = write_partition(tmp_path, "dev-clean", [5] * 20)
    for i in range(faults):
        (folder / "mfcc" / f"{i:04d}.npy").write_bytes(b"")
    lines = refusal(tmp_path).splitlines()
    assert lines[0] == f"{folder}: {faults} fault(s) in the data"
    assert [f"{i:04d}.npy" in line for i, line in enumerate(lines[1:11])] == [True] * min(
        faults, 10
    )
    assert lines[11:] == ([f"... and {faults - 10} more"] if faults > 10 else [])


def test_faults_of_both_kinds_are_reported_together(tmp_path):
    folder = write_partition(tmp_path, "dev-clean", [5] * 6)
    (folder / "mfcc" / "0000.npy").write_bytes(b"")
    (folder / "transcript" / "0000.npy").write_bytes(b"")
    np.save(folder / "mfcc" / "0001.npy", np.zeros((5, 27), np.float32))
    np.save(folder / "mfcc" / "0002.npy", np.zeros((4, 28), np.float32))
    np.save(folder / "mfcc" / "0003.npy", np.full((5, 28), np.nan))
    np.save(folder / "transcript" / "0004.npy", np.array(["[SOS]"] * 7))
    lines = refusal(tmp_path).splitlines()
    assert lines[0].endswith("6 fault(s) in the data")
    for line, name in zip(
        lines[1:],
        (
            "mfcc/0000",
            "transcript/0000",
            "mfcc/0001",
            "transcript/0002",
            "mfcc/0003",
            "transcript/0004",
        ),
    ):
        assert str(folder / f"{name}.npy") in line


@pytest.mark.parametrize("kind", ["mfcc", "transcript"])
@pytest.mark.parametrize(
    "error", [PermissionError(13, "Permission denied"), FileNotFoundError(2, "No such file")]
)
def test_a_file_that_cannot_be_read(root, monkeypatch, kind, error):
    path, read_bytes = root / "dev-clean" / kind / "0001.npy", Path.read_bytes

    def refuse(name):
        if name == path:
            raise error
        return read_bytes(name)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    message = refusal(root)
    assert str(path) in message and error.strerror in message


def test_what_python_2_wrote_is_read_without_a_warning(root):
    path = root / "dev-clean" / "mfcc" / "0001.npy"
    expected = AudioDataset(root, "dev-clean").frames
    path.write_bytes(path.read_bytes().replace(b"(9, 28), } ", b"(9L, 28L),}"))
    assert b"28L" in path.read_bytes()
    assert AudioDataset(root, "dev-clean").frames.equal(expected)


@pytest.mark.slow
def test_random_damage_is_refused_or_harmless(corpus, tmp_path):
    source, outcomes = take_source(corpus, tmp_path / "source"), collections.Counter()

    @settings(
        max_examples=600,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.randoms(use_true_random=False))
    def damage(rng):
        outcomes[attempt(source, rng)[1]] += 1

    damage()
    assert outcomes.total() >= 500 and min(outcomes["loaded"], outcomes["refused"]) >= 50
