"""Ctrl-C at random moments: KeyboardInterrupt is raised, and the next call gives the same bytes.

The same process goes on, as after a notebook's stop button. Training and kills: test_resume.py.
"""

import os
import time

import numpy as np
import pytest
import torch
from support import kills
from support.reference import contents

import helpers

pytestmark = pytest.mark.skipif(
    os.name == "nt", reason="a process cannot press Ctrl-C for itself there"
)
STATE = {"model": torch.arange(4e6), "config": {}}
LABELS = np.random.default_rng(0).choice(helpers.PHONEMES[:40], 100_000)


def librispeech(tmp_path):
    from support.librispeech import row, write

    source = write(tmp_path / "x.parquet", [row(f"{i}-0") for i in range(15)])
    return lambda folder: folder.exists() or helpers.make_librispeech_corpus(folder, source)


def packing(tmp_path):
    helpers.make_practice_corpus(tmp_path / "data", (9, 1, 1))
    return lambda folder: helpers.read_partition(tmp_path / "data", "train-clean-100", cache=folder)


MAKERS = {
    "practice corpus": lambda _: (
        lambda root: root.exists() or helpers.make_practice_corpus(root, (3, 1, 1))
    ),
    "librispeech": librispeech,
    "packing": packing,
    "checkpoint": lambda _: lambda folder: helpers.save_checkpoint(folder / "checkpoint.pt", STATE),
    "submission": lambda _: (
        lambda folder: helpers.write_submission(folder / "submission.csv", LABELS)
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("maker", MAKERS.values(), ids=MAKERS)
def test_interrupted_at_random_moments_it_ends_with_the_same_bytes(tmp_path, maker, draw):
    make = maker(tmp_path)
    make(tmp_path / "first")  # libraries are loaded
    start = time.perf_counter()
    make(tmp_path / "whole")
    seconds, whole = time.perf_counter() - start, contents(tmp_path / "whole")
    interrupts = 0
    for i in range(12):
        folder = tmp_path / str(i)
        try:
            interrupts += kills.interrupted(
                lambda folder=folder: make(folder), draw.uniform(0, seconds)
            )
        except (
            helpers.RunError
        ) as error:  # fsspec, which looks for the parquet, takes an interrupt for a missing file
            assert "Unable to find" in str(error)
        assert not [*tmp_path.rglob(".*.tmp")]
        make(folder)
        assert contents(folder) == whole
    assert interrupts


def test_threads_end_with_the_interrupt():
    done = []

    def work(job):
        time.sleep(0.01)
        done.append(job)

    assert kills.interrupted(lambda: list(helpers.map_in_threads(work, range(100_000))), 0.2)
    count = len(done)
    time.sleep(0.1)
    assert len(done) == count


@pytest.mark.slow
def test_what_is_said_after_an_interrupt_is_the_same(draw):
    expected = helpers.speak("They sang both songs.", "f1")[0]
    interrupted = []
    for _ in range(10):  # thirty sentences take a few tenths of a second
        interrupted.append(
            kills.interrupted(
                lambda: [helpers.speak("They sang both songs.") for _ in range(30)],
                draw.uniform(0, 0.1),
            )
        )
        assert np.array_equal(helpers.speak("They sang both songs.", "f1")[0], expected)
    assert any(interrupted)
