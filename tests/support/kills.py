"""Training runs in child processes: killed, interrupted, out of disk space; and what they leave."""

import contextlib
import multiprocessing
import os
import signal
import threading
import time
import traceback
from pathlib import Path

import pandas as pd
import torch
from tqdm import tqdm

import helpers
from support.configs import RANDOM
from support.notebook import LAST, TRAINING, run_cells

CONFIGS = {
    "adamw, cosineanneal": RANDOM,
    "sgd, reducelronplateau": {**RANDOM, "optimizers": "sgd", "scheduler": "reducelronplateau"},
}
# seconds at each of the five steps of writing a checkpoint, so that random kills land there too
PAUSE = 0.1
# of what a run writes, the clock's readings and a random name: the only things that may differ
NOT_COMPARED = ("seconds", "frames_per_second", "wandb_id")

# A server imports the packages once and forks a child for each run, which then starts at once. It
# does not know the changed sys.path, so it cannot import the project's own files.
server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(
    [
        "torch._dynamo",
        "torchaudio",
        "wandb",
        "torchsummaryX",
        "pandas",
        "matplotlib.pyplot",
        "IPython.display",
        "nbclient",
        "nbformat",
        "tqdm.auto",
        "datasets",
    ]
)


def _run(runs, data, changes, stop, pause):
    """The child: execute the cells, and note each step in the file `places`, a line each."""
    torch.set_num_threads(1)
    tqdm.set_lock(
        threading.RLock()
    )  # tqdm's own would be a semaphore that a killed process leaves behind
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
        if TRAINING in source or phase == "in an epoch":
            phase = "in an epoch" if TRAINING in source else "after training"
            at(phase)

    def write_in_parts(path, data):
        if not saving:
            return write(path, data)
        third = len(data) // 3
        with open(path, "wb", buffering=0) as file:
            for i in range(3):
                file.write(data[i * third : (i + 1) * third if i < 2 else None])
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
        run_cells(changes, LAST, runs, data, before_cell)
    except BaseException:
        traceback.print_exc()
        raise


def start(runs, data, changes=RANDOM, stop=None, pause=0.0):
    """Start a run in a child process.

    stop: a place, such as "writing checkpoint.pt, part 2", at which the child waits to be killed.
    pause: seconds spent at each step of writing a checkpoint, so that random kills land there.
    """
    runs.mkdir(parents=True, exist_ok=True)
    (runs / "places").write_text("")
    child = server.Process(target=_run, args=(runs, data, changes, stop, pause))
    child.start()
    return child


def wait_until_stopped(child, runs):
    """Wait for the child to come to the place at which it stops."""
    deadline = time.monotonic() + 60
    while not (runs / "places").read_text().endswith("stopped\n"):
        assert child.is_alive(), (
            f"the run ended without coming to the place\n{(runs / 'log').read_text()}"
        )
        assert time.monotonic() < deadline, "the run did not come to the place"
        time.sleep(0.005)


def kill(child, runs, delay=None):
    """SIGKILL after a delay (seconds), or where the child stopped.

    Returns the place, or None if the child had ended by itself.
    """
    if delay is None:
        wait_until_stopped(child, runs)
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


def finish(runs, data, changes=RANDOM):
    """Let a run come to its end. Returns what it printed."""
    child = start(runs, data, changes)
    child.join(120)
    assert child.exitcode == 0, (runs / "log").read_text()
    return (runs / "log").read_text()


def start_reporting(function, *arguments):
    """Start function(report, *arguments) in a child.

    Returns (child, connection); what the child gives to `report.send` is received there.
    """
    received, report = server.Pipe(duplex=False)
    child = server.Process(target=function, args=(report, *arguments))
    child.start()
    report.close()  # the child has it now: when it is gone, there is no more to receive
    return child, received


def in_child(function, *arguments):
    """Call a function in a child process and wait for it. Returns its exit code."""
    child = server.Process(target=function, args=arguments)
    child.start()
    child.join(120)
    return child.exitcode


def interrupted(function, delay):
    """Call a function and press Ctrl-C after `delay` seconds.

    Returns True if the call ended in KeyboardInterrupt, False if it had ended by itself.
    """
    sent = threading.Event()
    # a job in the background, or of nohup, is started with Ctrl-C ignored
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def press():
        sent.set()
        os.kill(os.getpid(), signal.SIGINT)

    timer = threading.Timer(delay, press)
    try:
        timer.start()
        function()
        timer.cancel()
        timer.join()
    except KeyboardInterrupt:
        return True
    finally:
        signal.signal(signal.SIGINT, before)
    assert not sent.is_set(), "the interrupt was swallowed"
    return False


def frozen(value):
    """The value in a form that == compares, tensors bit by bit, without the NOT_COMPARED."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.cpu().numpy().tobytes()
    if isinstance(value, dict):
        return {key: frozen(item) for key, item in value.items() if key not in NOT_COMPARED}
    return [frozen(item) for item in value] if isinstance(value, (list, tuple)) else value


def outcome(runs, name="pencil"):
    """What a finished run leaves (checkpoint, best weights, submission), comparable with ==."""
    folder = runs / name
    left_over = [path.name for path in folder.glob(".*") if path.name != ".lock"]
    assert not left_over, left_over
    files = {
        name: frozen(torch.load(folder / name, weights_only=True))
        for name in ("checkpoint.pt", "best.pt")
    }
    return {
        **files,
        "submission": pd.read_csv(folder / "submission.csv", keep_default_na=False).values.tolist(),
    }


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
