"""Runs like those that the notebook hands to wandb, and what wandb keeps of a run offline."""

import json
import struct
import time
from types import SimpleNamespace

import numpy as np

import helpers

CONFIG = {"Name": "a run (lr=0.01) é", "wandb": "offline", "epochs": 3, "artifacts": True}
ROWS = [{"epoch": epoch, "val_acc": epoch / 10, "seconds": 1.5 * epoch} for epoch in range(1, 6)]


def run_of(folder, history, run_id="abcd", **changes):
    return SimpleNamespace(
        config={**CONFIG, **changes},
        folder=folder,
        wandb_id=run_id,
        history=history,
        group=None,
        model="Network(\n  (0): Linear()\n)",
        details={"device": "é"},
        message="",
    )


def log(run, history):
    run.history = history
    helpers.log_history(run)


def results_of(folder):
    """Results as `evaluate_best` makes them, and a submission, of a run in this folder."""
    confusion = np.eye(42, dtype=int)
    for name in ("best.pt", "submission.csv"):
        (folder / name).write_text(name)
    return SimpleNamespace(
        best={**ROWS[1], "val_loss": 1.5, "train_acc": 0.1},
        test_acc=np.float64(0.25),
        accuracy={"frame alone": np.float64(0.2)},
        confusion=confusion,
        by_phoneme=helpers.accuracy_by_phoneme(confusion),
    )


def wandb_records(folder):
    """The records of the newest offline run.

    The file is LevelDB's log format (blocks of 32 KiB, headers of 7 bytes) after 7 bytes.
    """
    from wandb.proto import wandb_internal_pb2

    [*_, path] = sorted(folder.glob("wandb/offline-run-*/*.wandb"))
    data, position, whole = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:  # too little room for a header: the next block
            position += 32768 - position % 32768
            continue
        length, kind = struct.unpack("<HB", data[position + 4 : position + 7])
        whole += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a full record, or its last part
            yield wandb_internal_pb2.Record.FromString(whole)
            whole = b""


def wandb_values(items):
    """The items of one of these records as a dict."""
    return {item.key or item.nested_key[0]: json.loads(item.value_json) for item in items}


def finished_records(folder):
    """The records of the newest offline run, once its last one is there.

    wandb's `finish` does not wait for the file.
    """
    for _ in range(600):
        records = [*wandb_records(folder)]
        if any(record.WhichOneof("record_type") == "exit" for record in records):
            return records
        time.sleep(0.05)
    raise AssertionError(f"{folder}: the run's file has no end")


def without_wandbs_own(row):
    return {key: value for key, value in row.items() if not key.startswith("_")}


def rows_in(folder):
    """The rows of the newest offline run, a dict each, without wandb's own entries."""
    return [
        without_wandbs_own(wandb_values(record.history.item))
        for record in finished_records(folder)
        if record.HasField("history")
    ]
