"""The packed copy of the data: what it holds, when it is rebuilt, and that it never stops a run."""

import errno
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import safetensors.torch
import torch
from support import kills
from support.damage import CUT, FOREIGN, damaged_by
from support.reference import check_windows, packed_equal, read_partition, write_partition

import helpers
from helpers import AudioDataset

PARTITIONS = helpers.PARTITIONS


@pytest.fixture
def small(tmp_path):
    for seed, partition in enumerate(PARTITIONS):  # a partition's copy must not pass for another's
        write_partition(tmp_path / "data", partition, [20, 5, 1, 9], seed)
    return tmp_path / "data"


def make_unreadable(data):
    """Overwrite the files, but keep their sizes and times: whoever reads them gets a DataError."""
    for path in data.rglob("*.npy"):
        status = path.stat()
        path.write_bytes(bytes(status.st_size))
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("partition", PARTITIONS)
def test_the_second_load_is_the_first_without_reading(small, tmp_path, partition):
    expected, plain = read_partition(small, partition), helpers.read_partition(small, partition)
    first = helpers.read_partition(small, partition, cache=tmp_path / "deep" / "cache")
    make_unreadable(small)
    second = helpers.read_partition(small, partition, cache=tmp_path / "deep" / "cache")
    assert packed_equal(first, plain) and packed_equal(second, plain)
    assert {path.suffix for path in (tmp_path / "deep" / "cache").iterdir()} <= {
        ".safetensors",
        ".lock",
    }
    check_windows(AudioDataset(small, partition, 7, cache=tmp_path / "deep" / "cache"), expected)


def test_contexts_up_to_the_gap_share_one_cache(small, tmp_path):
    expected = read_partition(small, "dev-clean")
    AudioDataset(small, "dev-clean", 50, cache=tmp_path)
    make_unreadable(small)
    for context in (0, 1, 30, 50):
        check_windows(AudioDataset(small, "dev-clean", context, cache=tmp_path), expected)
    with pytest.raises(helpers.DataError):
        AudioDataset(small, "dev-clean", 51, cache=tmp_path)


def rewrite(function, *kinds, name="0001.npy", same_time=False):
    """A change: the arrays of one utterance go through a function.

    The files get a later time of modification, or keep theirs.
    """

    def change(folder):
        for path in (folder / kind / name for kind in kinds):
            time = path.stat().st_mtime_ns
            np.save(path, function(np.load(path)))
            os.utime(path, ns=(time, time if same_time else path.stat().st_mtime_ns + 1))

    return change


def for_both(function):
    """A change: a function of the paths of both files of the third utterance."""
    return lambda folder: [function(folder / kind / "0002.npy") for kind in ("mfcc", "transcript")]


CHANGES = {
    "same size": rewrite(lambda mfcc: mfcc[::-1], "mfcc"),
    "other size, same time": rewrite(
        lambda array: np.delete(array, 1, axis=0), "mfcc", "transcript", same_time=True
    ),
    "transcript": rewrite(
        lambda text: np.where(text == text[1], "OY", text).astype("<U5"), "transcript"
    ),
    "a file more": for_both(lambda path: shutil.copy(path, path.with_name("0000b.npy"))),
    "a file less": for_both(lambda path: path.unlink()),
    "another name": for_both(lambda path: path.rename(path.with_name("9.npy"))),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_stale_cache_is_rebuilt(small, tmp_path, change):
    old = helpers.read_partition(small, "dev-clean", cache=tmp_path)
    change(small / "dev-clean")
    new = helpers.read_partition(small, "dev-clean")
    assert packed_equal(helpers.read_partition(small, "dev-clean", cache=tmp_path), new)
    assert not packed_equal(old, new)


@pytest.mark.parametrize(
    "changes",
    [
        {"subset": 0.5},
        {"gap": 60},
        {"subset": 0.75, "gap": 1000},
        {"partition": "train-clean-100"},
        {"partition": "test-clean"},
    ],
    ids=str,
)
def test_other_arguments_have_another_cache(small, tmp_path, changes):
    helpers.read_partition(small, "dev-clean", cache=tmp_path)
    arguments = {"partition": "dev-clean", **changes}
    for _ in range(2):
        assert packed_equal(
            helpers.read_partition(small, cache=tmp_path, **arguments),
            helpers.read_partition(small, **arguments),
        )


def test_damage_after_caching_is_seen(small, tmp_path):
    helpers.read_partition(small, "dev-clean", cache=tmp_path)
    with open(small / "dev-clean" / "mfcc" / "0002.npy", "ab") as file:
        file.write(b"!")
    with pytest.raises(helpers.DataError, match="0002.npy"):
        helpers.read_partition(small, "dev-clean", cache=tmp_path)


TENSORS = {"frames": torch.zeros(3, 28), "labels": torch.zeros(3)}
ANOTHER = {
    "another file of this kind": lambda data: safetensors.torch.save(TENSORS),
    "another file with a key": lambda data: safetensors.torch.save(TENSORS, {"key": "another"}),
}


@pytest.mark.slow
@damaged_by(CUT, FOREIGN, ANOTHER)
def test_partial_and_foreign_caches_are_rebuilt(small, tmp_path, damage):
    cache = tmp_path / "cache"
    expected = helpers.read_partition(small, "dev-clean")
    helpers.read_partition(small, "dev-clean", cache=cache)
    [path] = cache.glob("*.safetensors")
    path.write_bytes(damage(path.read_bytes()))
    assert packed_equal(helpers.read_partition(small, "dev-clean", cache=cache), expected)
    make_unreadable(small)  # and it is whole again
    assert packed_equal(helpers.read_partition(small, "dev-clean", cache=cache), expected)


def test_the_cache_of_another_partition_under_this_name_is_not_taken(small, tmp_path):
    expected = helpers.read_partition(small, "dev-clean")
    for partition in ("dev-clean", "train-clean-100"):
        helpers.read_partition(small, partition, cache=tmp_path)
    [dev], [train] = (
        tmp_path.glob("dev-clean*.safetensors"),
        tmp_path.glob("train-clean-100*.safetensors"),
    )
    dev.write_bytes(train.read_bytes())
    assert packed_equal(helpers.read_partition(small, "dev-clean", cache=tmp_path), expected)


@pytest.mark.parametrize(
    "owner, name, number",
    [
        (Path, "mkdir", errno.EACCES),
        (Path, "mkdir", errno.EROFS),
        (os, "fsync", errno.ENOSPC),
        (os, "replace", errno.ENOSPC),
    ],
)
def test_a_cache_that_cannot_be_written_does_not_stop_loading(
    small, tmp_path, monkeypatch, capsys, owner, name, number
):
    expected = helpers.read_partition(small, "dev-clean")
    monkeypatch.setattr(owner, name, Mock(side_effect=OSError(number, os.strerror(number))))
    assert packed_equal(
        helpers.read_partition(small, "dev-clean", cache=tmp_path / "cache"), expected
    )
    assert "going on without a cache" in capsys.readouterr().out
    assert [path.suffix for path in tmp_path.glob("cache/*")] in ([], [".lock"])


def test_a_cache_that_is_there_is_read_where_nothing_can_be_written(small, tmp_path, monkeypatch):
    expected = helpers.read_partition(small, "dev-clean", cache=tmp_path)
    make_unreadable(small)
    monkeypatch.setattr(helpers, "try_to_lock", Mock(side_effect=helpers.RunError("read-only")))
    assert packed_equal(helpers.read_partition(small, "dev-clean", cache=tmp_path), expected)


def test_without_mmap_the_cache_is_read(small, tmp_path, monkeypatch):
    monkeypatch.setattr(
        safetensors.torch, "safe_open", Mock(side_effect=OSError("No such device (os error 19)"))
    )
    expected = helpers.read_partition(small, "dev-clean")
    assert packed_equal(helpers.read_partition(small, "dev-clean", cache=tmp_path), expected)
    make_unreadable(small)
    assert packed_equal(helpers.read_partition(small, "dev-clean", cache=tmp_path), expected)


def test_a_cache_that_cannot_be_read_again_does_not_stop_loading(small, tmp_path, monkeypatch):
    monkeypatch.setattr(helpers, "_open_cache", lambda *args: None)
    for _ in range(2):
        assert packed_equal(
            helpers.read_partition(small, "dev-clean", cache=tmp_path),
            helpers.read_partition(small, "dev-clean"),
        )


def test_a_cache_folder_that_cannot_be_made_does_not_stop_loading(small, tmp_path, capsys):
    (tmp_path / "file").touch()
    for cache in (tmp_path / "file", tmp_path / "file" / "cache"):
        assert packed_equal(
            helpers.read_partition(small, "dev-clean", cache=cache),
            helpers.read_partition(small, "dev-clean"),
        )
        assert "going on without a cache" in capsys.readouterr().out


def test_of_several_loads_at_once_one_reads(small, tmp_path, capsys):
    with ThreadPoolExecutor(4) as pool:
        results = list(
            pool.map(lambda _: helpers.read_partition(small, "dev-clean", cache=tmp_path), range(4))
        )
    assert capsys.readouterr().out.count("reading 4 utterances of dev-clean") == 1
    assert all(packed_equal(result, results[0]) for result in results)


def load_beyond_the_limit(data, cache):
    with kills.limited(1000):
        assert helpers.read_partition(data, "dev-clean", cache=cache)["frames"].any()


@pytest.mark.slow
def test_a_disk_that_fills_up_while_the_cache_is_written_does_not_stop_loading(small, tmp_path):
    pytest.importorskip("resource")
    assert kills.in_child(load_beyond_the_limit, small, tmp_path) == 0
    assert [path.suffix for path in tmp_path.iterdir() if path.is_file()] == [".lock"]
