"""A run's copy on Google Drive: nothing goes to the trash, and a kill loses little.

A plain folder stands for Drive.
"""

import contextlib
import itertools
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from support import kills
from support.damage import CUT, FLIPPED, FOREIGN, damaged_by

import helpers
from helpers import (
    RunError,
    copy_to_drive,
    load_checkpoint,
    open_drive,
    restore_from_drive,
    save_checkpoint,
)


def train_to(folder, epochs, size=100):
    """Leave in a run's folder what `epochs` epochs leave."""
    history = [{"epoch": epoch} for epoch in range(1, epochs + 1)]
    save_checkpoint(folder / "best.pt", {"model": torch.full((size,), float(epochs)), "config": {}})
    save_checkpoint(
        folder / "checkpoint.pt",
        {"model": torch.full((size,), float(epochs)), "config": {}, "history": history},
    )


def epochs_of(folder):
    """The epochs of the checkpoint in a folder, which must be whole."""
    state = load_checkpoint(folder / "checkpoint.pt")
    assert (state["model"] == len(state["history"])).all()
    assert (load_checkpoint(folder / "best.pt")["model"] == len(state["history"])).all()
    return len(state["history"])


def files(drive):
    """{name: inode} of the files there.

    A file that is replaced gets another inode, and the old one would go to Drive's trash.
    """
    return {path.name: path.stat().st_ino for path in drive.iterdir()}


@pytest.fixture
def places(tmp_path):
    """The run's own folder, that on Drive, and that of a later session."""
    return tmp_path / "run", tmp_path / "drive" / "run", tmp_path / "later"


def test_a_run_that_opens_drive_gets_its_folder_there_and_the_epochs_in_it(tmp_path, monkeypatch):
    place = Path("pencil", "variants", "lr=1")
    monkeypatch.setattr(helpers, "DRIVE", tmp_path / "drive")
    on_drive = tmp_path / "drive" / "MyDrive" / "hw1p2-runs" / place
    train_to(tmp_path / "earlier", 2)
    copy_to_drive(tmp_path / "earlier", on_drive)
    run, other = (SimpleNamespace(folder=tmp_path / name, message="") for name in ("run", "other"))
    assert open_drive(other, place) is None and not other.folder.exists()  # not on Colab
    drive = SimpleNamespace(mount=lambda place: None)
    monkeypatch.setitem(sys.modules, "google.colab", SimpleNamespace(drive=drive))
    assert open_drive(run, place) == on_drive and epochs_of(run.folder) == 2
    assert run.message == f"{run.folder}: fetched from Google Drive, 2 epoch(s)\n"


def test_the_newest_copy_is_fetched_where_it_is_ahead(places):
    run, drive, later = places
    restore_from_drive(later, drive)  # nothing there yet
    assert not later.exists()
    for epochs in (1, 2, 3):
        train_to(run, epochs)
        copy_to_drive(run, drive)
        restore_from_drive(later, drive)
        assert epochs_of(later) == epochs
    train_to(later, 5)
    restore_from_drive(later, drive)
    assert epochs_of(later) == 5
    (later / "checkpoint.pt").write_bytes(b"damaged")
    restore_from_drive(later, drive)
    assert epochs_of(later) == 3


def test_nothing_goes_to_the_trash_and_only_what_cannot_be_made_again_is_there(places):
    run, drive, _ = places
    train_to(run, 1, 1000)
    for name in (
        "submission.csv",
        "model_arch.txt",
        ".lock",
        "wandb/x.wandb",
        "cache/packed.safetensors",
    ):
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text("long " * 100)
    copy_to_drive(run, drive)
    train_to(run, 2, 1000)
    copy_to_drive(run, drive)
    before = files(drive)
    assert set(before) == {"checkpoint-a.zip", "checkpoint-b.zip", "submission.csv"}
    (run / "submission.csv").write_text("short")
    for epochs in range(3, 8):
        train_to(
            run, epochs, 1000 if epochs % 2 else 10
        )  # a shorter file leaves no end of the longer one
        copy_to_drive(run, drive)
        assert files(drive) == before
    assert (drive / "submission.csv").read_text() == "short"
    restore_from_drive(places[2], drive)
    assert epochs_of(places[2]) == 7


def test_it_is_copied_before_ten_minutes_of_training_are_at_stake(places):
    run, drive, _ = places
    train_to(run, 1)
    copy_to_drive(run, drive, next_in=1)  # the first time always
    slots = [drive / name for name in helpers.DRIVE_SLOTS]

    for minutes, next_minutes, copied in [
        (1, 1, False),
        (1, 6, False),
        (1, 9, True),
        (6, 6, True),
        (8, 2, True),
        (30, 0.1, True),
    ]:
        for slot in filter(os.path.exists, slots):
            os.utime(slot, (time.time() - 60 * minutes,) * 2)
        before = [slot.stat().st_mtime for slot in slots if slot.exists()]
        copy_to_drive(run, drive, next_in=60 * next_minutes)
        assert ([slot.stat().st_mtime for slot in slots if slot.exists()] != before) == copied, (
            minutes,
            next_minutes,
        )


@damaged_by(CUT, FLIPPED, FOREIGN)
def test_a_damaged_copy_is_not_fetched_and_is_the_next_to_be_overwritten(places, damage):
    run, drive, later = places
    for epochs in (1, 2):
        train_to(run, epochs)
        copy_to_drive(run, drive)
    newest = drive / "checkpoint-b.zip"
    newest.write_bytes(damage(newest.read_bytes()))
    restore_from_drive(later, drive)
    assert epochs_of(later) == 1
    older = (drive / "checkpoint-a.zip").read_bytes()
    train_to(run, 3)
    copy_to_drive(run, drive)
    assert (drive / "checkpoint-a.zip").read_bytes() == older
    restore_from_drive(later, drive)
    assert epochs_of(later) == 3


def test_drive_that_is_full_or_away_does_not_stop_the_training(places, capsys, monkeypatch):
    run, drive, later = places
    train_to(run, 1)
    drive.parent.write_text("not a folder")
    copy_to_drive(run, drive)
    assert "the copy on Google Drive could not be updated" in capsys.readouterr().out
    drive.parent.unlink()
    copy_to_drive(run, drive)
    away = OSError(107, "Transport endpoint is not connected")
    with mock.patch.object(
        helpers.zipfile.ZipFile, "read", side_effect=away
    ):  # between the check and the copy
        with pytest.raises(RunError, match="on Google Drive cannot be read.*Transport endpoint"):
            restore_from_drive(later, drive)
    monkeypatch.setattr(helpers.zipfile, "ZipFile", mock.Mock(side_effect=away))
    before = (drive / "checkpoint-a.zip").read_bytes()
    copy_to_drive(run, drive)  # which of the two is whole is not known: neither is touched
    assert (
        "Transport endpoint" in capsys.readouterr().out
        and (drive / "checkpoint-a.zip").read_bytes() == before
    )
    with pytest.raises(RunError, match="on Google Drive cannot be read.*Transport endpoint"):
        restore_from_drive(later, drive)


def train_and_copy(report, run, drive, epochs):
    """One epoch after another, until it is killed."""
    for epoch in itertools.count(epochs + 1):
        train_to(run, epoch, 1_000_000)
        copy_to_drive(run, drive)
        report.send(epoch)


@pytest.mark.slow
def test_killed_at_any_moment_a_whole_copy_is_there(places, draw):
    run, drive, _ = places
    epochs, seen = 0, {}
    for number in range(4):
        child, received = kills.start_reporting(train_and_copy, run, drive, epochs)
        done = received.recv()
        time.sleep(draw.uniform(0, 0.2))
        child.kill()
        child.join()
        with contextlib.suppress(EOFError):
            while True:
                done = received.recv()
        later = run.parent / f"later {number}"  # another session, another machine
        restore_from_drive(later, drive)
        epochs = epochs_of(later)
        assert epochs in (done, done + 1)
        now = files(drive)
        assert now.items() >= seen.items() and set(now) <= set(helpers.DRIVE_SLOTS)
        seen = now
