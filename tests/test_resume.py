"""Checkpoints: a killed run ends like one that was never killed, or a resume is refused."""

import contextlib
import errno
import gc
import os
import pickle
import re
import shutil
import subprocess
import sys
import warnings
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from support import kills
from support.configs import UNPLANNED
from support.damage import CUT, FLIPPED, FOREIGN, damaged_by
from support.notebook import LAST, TRAINING, Session, definitions, run_cells

import helpers
from helpers import RunError

BOOK = definitions()
CONFIG, OPTIONS = BOOK["config"], BOOK["options"]()
ADAMW, SGD = kills.CONFIGS.values()
QUICK = {**UNPLANNED, "epochs": 1}

# ---- Killed runs ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    """What runs that are never killed leave."""
    outcomes = []
    for changes in (ADAMW, SGD):
        runs = tmp_path_factory.mktemp("whole")
        kills.finish(runs, corpus, changes)
        outcomes.append(kills.outcome(runs))
    return outcomes


@pytest.mark.slow
def test_a_run_killed_at_every_step_of_writing_ends_like_one_never_killed(whole, corpus, tmp_path):
    steps = [
        f"writing {name}, {step}"
        for name in ("best.pt", "checkpoint.pt")
        for step in ("part 1", "part 3", "before the move", "after the move")
    ]
    # the first two are killed at the checkpoint before the first epoch, the others after that epoch
    for step in ["writing checkpoint.pt, part 2", "writing checkpoint.pt, after the move", *steps]:
        child = kills.start(tmp_path, corpus, ADAMW, stop=step)
        assert kills.kill(child, tmp_path) == step
    assert "1 of 4 epochs are done, resuming" in kills.finish(tmp_path, corpus, ADAMW)
    assert kills.outcome(tmp_path) == whole[0]


@pytest.mark.slow
@pytest.mark.parametrize("changes, expected", [(ADAMW, 0), (SGD, 1)], ids=["adamw", "sgd"])
def test_a_run_killed_at_random_moments_ends_like_one_never_killed(
    whole, corpus, tmp_path, changes, expected, draw
):
    places = []
    for _ in range(4):
        child = kills.start(tmp_path, corpus, changes, pause=kills.PAUSE)
        places.append(kills.kill(child, tmp_path, draw.uniform(0.2, 1.8)))
    kills.finish(tmp_path, corpus, changes)
    assert kills.outcome(tmp_path) == whole[expected], f"killed at {places}"


@pytest.mark.slow
def test_the_comparison_notices_a_single_bit(whole):
    state = {"model": {"weight": torch.zeros(3)}, "history": [{"epoch": 1, "seconds": 1.0}]}
    other = {
        "model": {"weight": torch.tensor([0.0, 0.0, -0.0])},
        "history": [{"epoch": 1, "seconds": 2.0}],
    }
    assert kills.frozen(state) != kills.frozen(other)
    other["model"]["weight"] = torch.zeros(3)
    assert kills.frozen(state) == kills.frozen(other)
    assert whole[0] != whole[1]


# ---- What is resumed, and what is refused --------------------------------------------------------


def train_to_the_end(runs, data, **changes):
    """The run in this process; returns its checkpoint, comparable."""
    run_cells({**QUICK, **changes}, "def evaluate_best", runs, data)
    return kills.frozen(torch.load(runs / "pencil" / "checkpoint.pt", weights_only=True))


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    """A runs folder with a finished run of one epoch: to be copied, not used."""
    runs = tmp_path_factory.mktemp("trained")
    train_to_the_end(runs, corpus)
    (runs / "pencil" / ".lock").unlink(missing_ok=True)
    return runs


@pytest.fixture
def runs(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "runs")


@pytest.mark.slow
def test_a_finished_run_goes_straight_to_figures_and_csv(runs, corpus):
    checkpoint = runs / "pencil" / "checkpoint.pt"
    before = checkpoint.stat().st_mtime_ns, checkpoint.read_bytes()
    namespace = run_cells(QUICK, LAST, runs, corpus)
    assert (
        checkpoint.stat().st_mtime_ns,
        checkpoint.read_bytes(),
    ) == before  # an epoch would have written it
    assert len(namespace["history"]) == 1
    labels = helpers.read_submission(
        runs / "pencil" / "submission.csv", len(namespace["test_data"])
    )
    assert list(labels) == list(namespace["predictions"])


def other_value(key):
    """A value of this key that is allowed and is not QUICK's."""
    options = OPTIONS[key]
    now = {**CONFIG, **QUICK}[key]
    if isinstance(options, list):
        return next(option for option in options if option != now)
    if key in ("Name", "competition", "subset", "dropout", "dropout_scale", "lr_scale"):
        return "another" if OPTIONS[key] is str else 0.5
    return now + 1 if isinstance(now, int) else now / 2


@pytest.mark.parametrize(
    "key", [key for key in OPTIONS if key not in (*helpers.KEYS_FREE_ON_RESUME, "epochs")]
)
def test_another_config_is_refused_with_both_values(trained, key):
    state = torch.load(trained / "pencil" / "checkpoint.pt", weights_only=True)
    config = {**state["config"], key: other_value(key)}
    helpers.check_config(config, OPTIONS)
    with pytest.raises(RunError) as error:
        helpers.load_checkpoint(trained / "pencil" / "checkpoint.pt", config)
    assert f"{key}: {state['config'][key]!r} there, {config[key]!r} now" in str(error.value)
    assert "for a fresh run" in str(error.value)


@pytest.mark.slow
def test_all_differences_are_listed_by_the_notebook(runs, corpus):
    with pytest.raises(RunError, match="another config") as error:
        run_cells(
            {**QUICK, "learning_rate": 0.5, "activations": "gelu"},
            "def evaluate_best",
            runs,
            corpus,
        )
    assert "learning_rate: 0.001 there, 0.5 now" in str(error.value)
    assert "activations: 'leakyrelu' there, 'gelu' now" in str(error.value)
    assert len(re.findall(" there, ", str(error.value))) == 2


@pytest.mark.parametrize("key", helpers.KEYS_FREE_ON_RESUME)
def test_free_keys_may_differ(trained, key):
    path = trained / "pencil" / "checkpoint.pt"
    config = torch.load(path, weights_only=True)["config"]
    assert helpers.load_checkpoint(path, {**config, key: other_value(key)})["config"] == config


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", ["steplr", "exponential", "reducelronplateau"])
def test_epochs_may_be_raised_and_the_run_resumes(corpus, tmp_path, scheduler):
    train_to_the_end(tmp_path / "raised", corpus, scheduler=scheduler)
    raised = train_to_the_end(tmp_path / "raised", corpus, scheduler=scheduler, epochs=3)
    assert [row["epoch"] for row in raised["history"]] == [1, 2, 3]
    assert raised == train_to_the_end(tmp_path / "at once", corpus, scheduler=scheduler, epochs=3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{"scheduler": "cosineanneal"}, {"dropout_scale": "auto"}], ids=str
)
def test_epochs_may_not_be_raised_where_the_training_is_planned_for_them(corpus, tmp_path, changes):
    train_to_the_end(tmp_path, corpus, **changes)
    with pytest.raises(
        RunError, match="epochs: 1 there, 2 now(.|\n)*schedule or dropout_scale 'auto'"
    ):
        train_to_the_end(tmp_path, corpus, **changes, epochs=2)


def test_an_added_schedule_counts_as_planned_for_its_number_of_epochs(tmp_path):
    config = {"scheduler": "linear", "dropout_scale": 1, "epochs": 3}
    helpers.save_checkpoint(tmp_path / "checkpoint.pt", {"config": config, "history": []})
    assert helpers.load_checkpoint(tmp_path / "checkpoint.pt", config)["config"] == config
    with pytest.raises(RunError, match="epochs: 3 there, 6 now"):
        helpers.load_checkpoint(tmp_path / "checkpoint.pt", {**config, "epochs": 6})


@pytest.mark.slow
def test_without_the_checkpoint_the_old_best_weights_are_not_taken_for_the_new_runs(runs, corpus):
    (runs / "pencil" / "checkpoint.pt").unlink()
    session = Session(runs, corpus, QUICK)
    session.run_all(until="history = fit(run)")
    session.call("make_run", session["config"])
    assert (
        not (runs / "pencil" / "best.pt").exists() and (runs / "pencil" / "checkpoint.pt").exists()
    )


@pytest.mark.slow
def test_other_data_under_the_same_name_is_refused(runs, corpus, tmp_path):
    smaller = shutil.copytree(corpus, tmp_path / "corpus")
    for path in sorted(smaller.glob("train-clean-100/*/*.npy"))[::24]:  # the first of each folder
        path.unlink()
    with pytest.raises(RunError, match="was trained on .*choose another"):
        train_to_the_end(runs, smaller, epochs=2)
    before = kills.frozen(torch.load(runs / "pencil" / "checkpoint.pt", weights_only=True))
    elsewhere = shutil.copytree(
        corpus, tmp_path / "another"
    )  # the same data, whatever the folder's name
    assert before == train_to_the_end(runs, elsewhere)


# ---- Damage --------------------------------------------------------------------------------------


class Intruder:
    """Its pickle makes a folder when it is loaded."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def refused(path):
    """load_checkpoint must refuse this file, with a config and without."""
    config = {"scheduler": "steplr", "dropout_scale": 1}
    for arguments in ((), (config,)):
        with pytest.raises(RunError) as error:
            helpers.load_checkpoint(path, *arguments)
        assert str(path) in str(error.value) and "for a fresh run" in str(error.value)


@damaged_by(CUT, FLIPPED, FOREIGN)
def test_a_damaged_checkpoint_is_refused(runs, damage):
    path = runs / "pencil" / "checkpoint.pt"
    path.write_bytes(damage(path.read_bytes()))
    refused(path)


@pytest.mark.parametrize(
    "state", [torch.zeros(3), {"model": {}}, {"config": 5}, [1, 2], "text"], ids=str
)
def test_a_torch_file_of_something_else_is_refused(tmp_path, state):
    torch.save(state, tmp_path / "checkpoint.pt")
    refused(tmp_path / "checkpoint.pt")


@pytest.mark.slow
def test_best_weights_in_the_place_of_the_checkpoint_are_refused(runs, corpus):
    shutil.copy(runs / "pencil" / "best.pt", runs / "pencil" / "checkpoint.pt")
    with pytest.raises(
        RunError, match=re.escape(str(runs / "pencil" / "checkpoint.pt")) + ": .*for a fresh run"
    ):
        train_to_the_end(runs, corpus)
    (runs / "pencil" / "checkpoint.pt").unlink()  # without it, the run starts afresh
    train_to_the_end(runs, corpus)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_not_executed(tmp_path, zipped):
    path, folder = tmp_path / "checkpoint.pt", tmp_path / "made by the intruder"
    if zipped:
        torch.save({"config": {}, "history": Intruder(folder)}, path)
    else:
        path.write_bytes(pickle.dumps({"config": {}, "history": Intruder(folder)}))
    refused(path)
    assert not folder.exists()


# ---- What can be read again ----------------------------------------------------------------------


def test_numpys_numbers_become_pythons_at_any_depth(tmp_path):
    path = tmp_path / "checkpoint.pt"
    weights = torch.nn.Linear(2, 2).state_dict()  # an OrderedDict with attributes
    history = [
        {
            "epoch": np.int64(1),
            "kappa": np.float32(0.25),
            "good": np.bool_(True),
            "by": {np.str_("a"): (1.5,)},
        }
    ]
    helpers.save_checkpoint(path, {"config": {}, "model": weights, "history": history})
    state = helpers.load_checkpoint(path)
    assert state["history"] == [{"epoch": 1, "kappa": 0.25, "good": True, "by": {"a": (1.5,)}}]
    assert [type(value) for value in state["history"][0].values()] == [int, float, bool, dict]
    assert type(state["model"]) is type(weights) and state["model"]._metadata == weights._metadata
    assert isinstance(history[0]["kappa"], np.float32)  # the dict that was given is as it was


class Thing:
    """What weights_only does not load."""


@pytest.mark.parametrize(
    "value, name",
    [(np.zeros(3), "ndarray"), (Thing(), "Thing"), (print, "builtin"), (lambda: 0, "function")],
    ids=str,
)
def test_what_could_not_be_read_again_is_named_and_the_old_checkpoint_stays(tmp_path, value, name):
    path = tmp_path / "checkpoint.pt"
    helpers.save_checkpoint(path, {"config": {}, "history": [{"epoch": 1}]})
    before = path.read_bytes()
    with pytest.raises(
        RunError, match=rf"history'\]\[1\]\['mine'\] is .*, a {name}.*before is unchanged"
    ):
        helpers.save_checkpoint(
            path, {"config": {}, "history": [{"epoch": 1}, {"epoch": 2, "mine": value}]}
        )
    assert path.read_bytes() == before and [entry.name for entry in tmp_path.iterdir()] == [
        "checkpoint.pt"
    ]


def test_what_was_written_is_read_back_before_it_replaces_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    helpers.save_checkpoint(path, {"config": {}, "epoch": 1})
    before, write = path.read_bytes(), helpers.Path.write_bytes
    monkeypatch.setattr(
        helpers.Path, "write_bytes", lambda path, data: write(path, bytes(data)[:-100])
    )
    with pytest.raises(RunError, match="could not be read back"):
        helpers.save_checkpoint(path, {"config": {}, "epoch": 2})
    assert path.read_bytes() == before


@pytest.mark.slow
def test_a_schedule_with_numpys_numbers_is_resumed(corpus, tmp_path):
    def train(runs, epochs):
        session = Session(runs, corpus, {**QUICK, "epochs": 3})
        session.run_all(until=TRAINING)
        session.namespace["SCHEDULERS"]["steplr"] = session["Schedule"](
            lambda optimizer, epochs, steps: torch.optim.lr_scheduler.LambdaLR(
                optimizer, lambda epoch: np.cos(epoch / 3)
            )
        )
        run_epoch = session["run_epoch"]

        def stop_later(run, epoch):
            if epoch > epochs:
                raise KeyboardInterrupt
            return {**run_epoch(run, epoch), "mine": np.float32(0.5)}

        session.namespace["run_epoch"] = stop_later
        with contextlib.suppress(KeyboardInterrupt):
            session.run(TRAINING)
        return kills.frozen(helpers.load_checkpoint(runs / "pencil" / "checkpoint.pt"))

    train(tmp_path / "a", 1)
    assert train(tmp_path / "a", 3) == train(tmp_path / "b", 3)


# ---- Full disks ----------------------------------------------------------------------------------

STATE = {"config": {}, "model": {"weight": torch.arange(500_000.0)}}  # 2 MB
FULL = (
    r"(checkpoint|best)\.pt could not be written .*: {} MB are needed there, "
    r"[\d.]+ MB are free.*unchanged"
)


def stays_usable_when_full(path):
    """Saving STATE to `path`, where a smaller checkpoint is, must fail and leave that one alone."""
    before = path.read_bytes()
    for _ in range(2):
        with pytest.raises(RunError, match=FULL.format("2.0")):
            helpers.save_checkpoint(path, STATE)
        assert path.read_bytes() == before
        assert [entry.name for entry in path.parent.iterdir()] == ["checkpoint.pt"]
    assert helpers.load_checkpoint(path)["config"] == {"epoch": 1}


def save_beyond_the_limit(path):
    with kills.limited(1_000_000):
        stays_usable_when_full(path)
    helpers.save_checkpoint(path, STATE)


@pytest.mark.slow
def test_where_files_cannot_grow_the_previous_checkpoint_stays(tmp_path):
    pytest.importorskip("resource")
    helpers.save_checkpoint(tmp_path / "checkpoint.pt", {"config": {"epoch": 1}})
    assert (
        kills.in_child(save_beyond_the_limit, tmp_path / "checkpoint.pt") == 0
    )  # the limit is for a whole process
    assert helpers.load_checkpoint(tmp_path / "checkpoint.pt")["model"]["weight"].equal(
        STATE["model"]["weight"]
    )


def test_on_a_full_disk_the_previous_checkpoint_stays(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no right to mount a small disk")
    try:
        helpers.save_checkpoint(disk / "checkpoint.pt", {"config": {"epoch": 1}})
        stays_usable_when_full(disk / "checkpoint.pt")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def run_on_a_full_disk(runs, data):
    with kills.limited(500_000), pytest.raises(RunError, match=FULL.format(r"[\d.]+")):
        train_to_the_end(runs, data, epochs=2)


@pytest.mark.slow
def test_a_run_on_a_full_disk_stops_and_resumes_later(runs, corpus, tmp_path):
    pytest.importorskip("resource")
    before = (runs / "pencil" / "checkpoint.pt").read_bytes()
    assert kills.in_child(run_on_a_full_disk, runs, corpus) == 0
    assert (runs / "pencil" / "checkpoint.pt").read_bytes() == before
    assert not list((runs / "pencil").glob(".*.tmp"))
    assert len(train_to_the_end(runs, corpus, epochs=2)["history"]) == 2


# ---- Two runs in one folder ----------------------------------------------------------------------


@pytest.mark.slow
def test_two_runs_in_one_folder_are_refused_until_the_first_is_gone(corpus, tmp_path):
    first = kills.start(tmp_path, corpus, QUICK, stop="writing checkpoint.pt, part 1")
    kills.wait_until_stopped(first, tmp_path)
    with pytest.raises(RunError, match="pencil: another notebook .*config\\['Name'\\]"):
        helpers.lock_run(tmp_path / "pencil")
    with pytest.raises(RunError, match="another notebook"):
        train_to_the_end(tmp_path, corpus)
    kills.kill(first, tmp_path)
    train_to_the_end(tmp_path, corpus)


@pytest.mark.slow
def test_a_run_that_is_forgotten_lets_its_folder_go_without_a_warning(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(
        sys, "unraisablehook", told.append
    )  # where an error goes that is raised while memory is freed
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lock = helpers.lock_run(tmp_path / "run")
        del lock
        gc.collect()
        assert not told
        forgotten = open(tmp_path / "a file", "w")
        del forgotten
        gc.collect()
        assert len(told) == 1  # as for any other file
    assert kills.in_child(helpers.lock_run, tmp_path / "run") == 0


@pytest.mark.slow
def test_one_process_may_take_its_folder_again(tmp_path):
    locks = [helpers.lock_run(tmp_path / "run") for _ in range(3)]
    assert kills.in_child(helpers.lock_run, tmp_path / "run") == 1  # another process may not
    for lock in locks:
        lock.close()
    assert kills.in_child(helpers.lock_run, tmp_path / "run") == 0
    assert not helpers.lock_run(tmp_path / "run").closed


def test_a_run_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "runs").touch()
    with pytest.raises(RunError, match="runs.pencil cannot be written to: .*Not a directory"):
        helpers.lock_run(tmp_path / "runs" / "pencil")


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_without_locks_a_run_goes_on_with_a_warning(tmp_path, monkeypatch, capsys, number):
    fcntl = pytest.importorskip("fcntl")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").write_text(
        "4711\nanother-host\n"
    )  # as some programs leave it behind
    monkeypatch.setattr(fcntl, "flock", Mock(side_effect=OSError(number, os.strerror(number))))
    for _ in range(2):
        lock = helpers.lock_run(tmp_path / "run")
    printed = capsys.readouterr().out
    assert printed.count("cannot be locked on this file system") == 1 and not lock.closed
    assert str(tmp_path / "run" / ".lock") in printed and os.strerror(number) in printed
    with helpers.one_process_at_a_time(tmp_path / "thing"):
        assert str(tmp_path / ".thing.lock") in capsys.readouterr().out
