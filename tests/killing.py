"""Runs of the notebook's own code in child processes that are killed: for test_resume.py and benchmarks/kills.py."""

import contextlib
import multiprocessing
import os
import threading
import time
import traceback
from pathlib import Path

import pandas as pd
import torch
from notebook import TINY, run_cells
from tqdm import tqdm

import helpers

# dropout and masks draw from the random states, which a resume must bring back too
CHANGES = {**TINY, "epochs": 4, "dropout_alternate": False, "augmentations": "Both", "wandb": "disabled"}
# of what a run writes, the clock's readings and a random name: the only things that may differ
NOT_COMPARED = ("seconds", "frames_per_second", "wandb_id")

# A server imports the packages once and forks a child for each run, which then starts at once. (It knows no changed
# sys.path, so it cannot import the project's own files.)
server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(["torch._dynamo", "torchaudio", "wandb", "torchsummaryX", "pandas", "matplotlib.pyplot",
                               "IPython.display", "nbclient", "nbformat", "filelock", "tqdm.auto"])


def _run(runs, data, changes, stop, pause, until):
    """The child: execute the cells and note in `runs`/places where the run is, a line for each step."""
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # tqdm's own would be a semaphore that a killed process leaves behind
    log = os.open(runs / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    places = open(runs / "places", "a", buffering=1)
    phase, saving = "before training", None
    write, replace, save_checkpoint = Path.write_bytes, os.replace, helpers.save_checkpoint

    def at(place):
        places.write(place + "\n")
        if place == stop:
            places.write("stopped\n")
            time.sleep(600)
        if saving:
            time.sleep(pause)

    def before_cell(source):
        nonlocal phase
        if "history = fit(" in source or phase == "in an epoch":
            phase = "in an epoch" if "history = fit(" in source else "after training"
            at(phase)

    def write_in_parts(path, data):
        if not saving:
            return write(path, data)
        third = len(data) // 3
        with open(path, "wb", buffering=0) as file:
            for i in range(3):
                file.write(data[i * third:(i + 1) * third if i < 2 else None])
                at(f"writing {saving}, part {i + 1}")

    def replace_with_marks(source, target):
        if saving:
            at(f"writing {saving}, before the move")
        replace(source, target)
        if saving:
            at(f"writing {saving}, after the move")

    def save_checkpoint_with_marks(path, state):
        nonlocal saving
        saving = Path(path).name
        save_checkpoint(path, state)
        saving = None
        at(phase)

    Path.write_bytes, os.replace = write_in_parts, replace_with_marks
    helpers.save_checkpoint = save_checkpoint_with_marks
    at(phase)
    try:
        run_cells(changes, until, runs, data, before_cell)
    except BaseException:
        traceback.print_exc()
        raise


def start(runs, data, changes=CHANGES, stop=None, pause=0.0, until="table = wandb.Table("):
    """Start a run in a child process.

    stop: a place, such as "writing checkpoint.pt, part 2", at which the child waits to be killed.
    pause: seconds spent at each step of writing a checkpoint, so that random kills land there.
    """
    runs.mkdir(parents=True, exist_ok=True)
    (runs / "places").write_text("")
    child = server.Process(target=_run, args=(runs, data, changes, stop, pause, until))
    child.start()
    return child


def place(runs):
    """Where the last run in this folder is, or was when it was killed."""
    lines = (runs / "places").read_text().splitlines()
    return lines[-1] if lines else "before training"


def kill(child, runs, delay=None):
    """SIGKILL after a delay, or where the child stopped. Returns the place; None if it had ended by itself."""
    if delay is None:
        deadline = time.monotonic() + 60
        while place(runs) != "stopped":
            assert child.is_alive(), f"the run ended without coming to the place\n{(runs / 'log').read_text()}"
            assert time.monotonic() < deadline, "the run did not come to the place"
            time.sleep(0.005)
    else:
        child.join(delay)
    ended = not child.is_alive()
    child.kill()
    child.join()
    if ended or child.exitcode == 0:
        assert child.exitcode == 0, (runs / "log").read_text()
        return None
    where = [line for line in (runs / "places").read_text().splitlines() if line != "stopped"]
    return where[-1] if where else "before training"


def finish(runs, data, changes=CHANGES):
    """Let a run come to its end. Returns what it printed."""
    child = start(runs, data, changes)
    child.join(120)
    assert child.exitcode == 0, (runs / "log").read_text()
    return (runs / "log").read_text()


def fails(runs, data, changes=CHANGES):
    """The last lines that a run prints which must end with an error."""
    child = start(runs, data, changes)
    child.join(120)
    text = (runs / "log").read_text()
    assert child.exitcode == 1, text
    return text[text.rindex("Traceback"):]


def in_child(function, *arguments):
    """Call a function in a child process and wait for it. Returns its exit code."""
    child = server.Process(target=function, args=arguments)
    child.start()
    child.join(120)
    return child.exitcode


def frozen(value):
    """A value that can be compared with ==, tensors bit by bit; without what may differ between two equal runs."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.numpy().tobytes()
    if isinstance(value, dict):
        return {key: frozen(item) for key, item in value.items() if key not in NOT_COMPARED}
    return [frozen(item) for item in value] if isinstance(value, (list, tuple)) else value


def outcome(runs, name="pencil"):
    """All that a finished run leaves: checkpoint, best weights and submission, comparable with ==."""
    folder = runs / name
    left_over = [path.name for path in folder.glob(".*") if path.name != ".lock"]
    assert not left_over, left_over
    files = {name: frozen(torch.load(folder / name, weights_only=True)) for name in ("checkpoint.pt", "best.pt")}
    return {**files, "submission": pd.read_csv(folder / "submission.csv", keep_default_na=False).values.tolist()}


@contextlib.contextmanager
def limited(size):
    """Writing a file beyond `size` bytes fails, as on a full disk."""
    import resource
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
