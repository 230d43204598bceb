"""Where a run is kept, keys, and wandb: its curves with the real library, offline; and wandb without a network."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import wandb
from notebook import ROOT, wandb_records, wandb_values

import helpers
from helpers import RunError, cache_folder, load_secrets, log_history, open_drive, runs_folder, start_wandb, wandb_mode

CONFIG = {"Name": "a run (lr=0.01) é", "wandb": "offline", "epochs": 3}
ROWS = [{"epoch": epoch, "val_acc": epoch / 10, "seconds": 1.5 * epoch} for epoch in range(1, 6)]


@pytest.fixture(autouse=True)
def plain_environment(tmp_path, monkeypatch):
    """Neither keys nor settings of whoever runs the tests, neither Colab nor Kaggle; no run that is still open."""
    for name in [name for name in os.environ if name.startswith(("WANDB", "HW1P2", "KAGGLE", "NETRC"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(helpers, "KAGGLE", tmp_path / "kaggle")
    monkeypatch.chdir(tmp_path)
    yield
    if wandb.run is not None:
        wandb.run.finish()


def colab(monkeypatch, **modules):
    """This process as one of Colab's: google.colab with these attributes."""
    monkeypatch.setitem(sys.modules, "google.colab", SimpleNamespace(**modules))


def run_of(folder, history, run_id="abcd", **changes):
    return SimpleNamespace(config={**CONFIG, **changes}, folder=folder, wandb_id=run_id, history=history, group=None,
                           model="Network(\n  (0): Linear()\n)", details={"device": "é"})


def start(*arguments, **changes):
    return start_wandb(run_of(*arguments, **changes))


def finished_records(folder):
    """The records of the newest offline run, once its last one is there: `finish` does not wait for the file."""
    for _ in range(600):
        records = [*wandb_records(folder)]
        if any(record.WhichOneof("record_type") == "exit" for record in records):
            return records
        time.sleep(0.05)
    raise AssertionError(f"{folder}: the run's file has no end")


def rows_in(folder):
    """The rows of the newest offline run, a dict each, without wandb's own entries."""
    rows = [wandb_values(record.history.item) for record in finished_records(folder) if record.HasField("history")]
    return [{key: value for key, value in row.items() if not key.startswith("_")} for row in rows]


# ---- Folders -----------------------------------------------------------------------------------------------

def test_runs_go_where_the_environment_says_else_where_kaggle_keeps_them_else_here(tmp_path, monkeypatch):
    assert runs_folder() == Path("runs")
    (helpers.KAGGLE / "working").mkdir(parents=True)
    assert runs_folder() == helpers.KAGGLE / "working" / "runs"
    monkeypatch.setenv("PLACE", "elsewhere")
    for text, path in [("elsewhere", "elsewhere"), ("~/my runs", tmp_path / "my runs"), ("$PLACE/x", "elsewhere/x"),
                       ("${PLACE}", "elsewhere"), (' "a b" ', "a b"), ("'~/x'\n", tmp_path / "x")]:
        monkeypatch.setenv("HW1P2_RUNS", text)
        assert runs_folder() == Path(path)
    for empty in ("", "  ", '""'):
        monkeypatch.setenv("HW1P2_RUNS", empty)
        assert runs_folder() == helpers.KAGGLE / "working" / "runs"


def test_the_cache_is_neither_in_kaggles_saved_output_nor_on_drive(tmp_path, monkeypatch):
    assert cache_folder("runs") == Path("runs/cache")
    assert cache_folder(helpers.KAGGLE / "working" / "runs") == helpers.KAGGLE / "temp" / "hw1p2-cache"
    assert cache_folder(helpers.KAGGLE / "temp" / "runs") == helpers.KAGGLE / "temp" / "runs" / "cache"
    assert cache_folder("/content/drive/MyDrive/runs") == Path("/content/hw1p2-cache")
    assert cache_folder("/content/runs") == Path("/content/runs/cache")
    (helpers.KAGGLE / "working").mkdir(parents=True)
    monkeypatch.chdir(helpers.KAGGLE / "working")
    assert cache_folder("runs") == helpers.KAGGLE / "temp" / "hw1p2-cache"


# ---- Keys --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("place", ["colab", "kaggle"])
def test_each_secret_is_taken_by_itself_and_none_is_printed(monkeypatch, capsys, place):
    def secret(name):
        if name != "KAGGLE_KEY":
            raise KeyError(name)
        return "not-a-key"

    if place == "colab":
        colab(monkeypatch, userdata=SimpleNamespace(get=secret))
    else:
        helpers.KAGGLE.mkdir()
        client = SimpleNamespace(UserSecretsClient=lambda: SimpleNamespace(get_secret=secret))
        monkeypatch.setitem(sys.modules, "kaggle_secrets", client)
    monkeypatch.setenv("KAGGLE_KEY", "")  # empty is not there
    monkeypatch.setenv("KAGGLE_USERNAME", "mine")
    load_secrets("KAGGLE_API_TOKEN", "KAGGLE_USERNAME", "KAGGLE_KEY")
    assert os.environ["KAGGLE_KEY"] == "not-a-key" and os.environ["KAGGLE_USERNAME"] == "mine"
    assert "KAGGLE_API_TOKEN" not in os.environ and capsys.readouterr() == ("", "")


def test_a_secret_that_never_comes_stops_neither_the_notebook_nor_the_others(monkeypatch):
    never = threading.Event()
    colab(monkeypatch, userdata=SimpleNamespace(get=lambda name: never.wait() if name == "A" else "not-a-key"))
    load_secrets("A", "KAGGLE_KEY", seconds=0.5)
    assert os.environ["KAGGLE_KEY"] == "not-a-key" and "A" not in os.environ
    never.set()


# ---- Curves ------------------------------------------------------------------------------------------------

def test_every_epoch_is_in_the_curves_once_whatever_is_logged_between(tmp_path, capfd):
    run = start(tmp_path, [])
    for done in (1, 2, 3):
        log_history(run, ROWS[:done])
        log_history(run, ROWS[:done])  # again after an interrupt
        if done == 2:
            run.log({"chart": 7})
    run.summary.update({"best_epoch": 2, "best_val_acc": 0.2})
    run.log({"confusion": 1})
    assert start(tmp_path, ROWS[:4], epochs=5) is run  # more epochs, in the same session
    assert run.config["epochs"] == 5
    log_history(run, ROWS)
    run.finish()
    assert rows_in(tmp_path) == [*ROWS[:2], {"chart": 7}, ROWS[2], {"confusion": 1}, *ROWS[3:]]
    metrics = {record.metric.name: record.metric.step_metric for record in finished_records(tmp_path)
               if record.WhichOneof("record_type") == "metric"}
    assert {name: metrics[name] for name in ("val_acc", "seconds")} == {"val_acc": "epoch", "seconds": "epoch"}
    assert capfd.readouterr() == ("", "")


def test_a_second_session_has_the_earlier_ones_epochs_too(tmp_path):
    start(tmp_path, ROWS[:2]).finish()
    assert rows_in(tmp_path) == ROWS[:2]
    run = start(tmp_path, ROWS[:2])
    log_history(run, ROWS[:3])
    run.finish()
    assert run.id == "abcd" and rows_in(tmp_path) == ROWS[:3]


def test_the_server_gets_what_it_has_not_got():
    logged = []
    run = SimpleNamespace(summary={"epoch": 1, "best_epoch": 3}, log=logged.append, define_metric=lambda *_, **__: 0)
    log_history(run, ROWS[:3])
    assert logged == ROWS[1:3]


def test_another_run_that_is_open_is_finished_first(tmp_path):
    first = start(tmp_path / "a", ROWS[:1])
    second = start(tmp_path / "b", ROWS[:2], "other")
    assert wandb.run is second and second.id == "other"
    second.finish()
    assert rows_in(tmp_path / "a") == ROWS[:1] and rows_in(tmp_path / "b") == ROWS[:2]
    with pytest.raises(wandb.errors.UsageError):
        first.log({"x": 1})


def test_the_network_is_kept_with_the_run(tmp_path):
    start(tmp_path / "run (1)", []).finish()
    assert (tmp_path / "run (1)" / "model_arch.txt").read_text("utf-8") == "Network(\n  (0): Linear()\n)"
    [kept] = (tmp_path / "run (1)" / "wandb").glob("offline-run-*/files/model_arch.txt")
    assert not kept.is_symlink() and kept.read_text() == (tmp_path / "run (1)" / "model_arch.txt").read_text()
    saved = [file.path for record in finished_records(tmp_path / "run (1)") for file in record.files.files]
    assert "model_arch.txt" in saved


def test_disabled_it_does_nothing_and_everything_can_be_called(tmp_path):
    run = start(tmp_path, ROWS[:2], wandb="disabled")
    log_history(run, ROWS[:3])
    run.summary.update({"x": 1})
    run.log({"chart": 1})
    run.finish()
    assert not (tmp_path / "wandb").exists() and run.settings.mode == "disabled"


def test_project_and_name_are_the_environments_where_they_are_set(tmp_path, monkeypatch):
    assert (start(tmp_path / "a", []).project, wandb.run.name) == ("hw1p2", CONFIG["Name"])
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.setenv("WANDB_NAME", "a name")
    run = start(tmp_path / "b", [], "other")
    assert (run.project, run.name) == ("mine", "a name")


def test_a_run_that_a_sweep_has_opened_gets_the_whole_config_and_the_network(tmp_path, capfd):
    given = wandb.init(mode="offline", dir=tmp_path)
    given.config.update_locked({"epochs": 3, "x": 1}, user="sweep")
    assert start_wandb(run_of(tmp_path / "run", ROWS[:2]), given) is given
    assert given.config["Name"] == CONFIG["Name"] and given.config["device"] == "é" and given.config["x"] == 1
    assert "locked" not in "".join(capfd.readouterr())  # as wandb says of what is set again
    given.finish()
    assert rows_in(tmp_path) == ROWS[:2]
    [kept] = tmp_path.glob("wandb/offline-run-*/files/model_arch.txt")
    assert kept.read_text() == (tmp_path / "run" / "model_arch.txt").read_text() == "Network(\n  (0): Linear()\n)"


# ---- Online or offline -------------------------------------------------------------------------------------

def test_the_mode_is_the_configs_then_the_environments_then_what_wandb_finds(monkeypatch, capsys):
    codes, environments = [], []

    def run(command, env, **_):
        environments.append(env)
        return SimpleNamespace(returncode=codes.pop(), stderr="Traceback\nwandb.errors.X: bad key\n")

    monkeypatch.setattr(subprocess, "run", run)
    assert [wandb_mode(choice) for choice in ("offline", "disabled")] == ["offline", "disabled"]
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert [wandb_mode(choice) for choice in ("auto", "offline")] == ["disabled", "offline"]
    codes.append(0)
    assert wandb_mode("online") == "online" and environments[-1]["WANDB_MODE"] == "online"
    monkeypatch.delenv("WANDB_MODE")
    codes += [1, 3, 0]
    assert [wandb_mode("auto") for _ in range(3)] == ["online", "offline", "offline"]
    assert capsys.readouterr().out == "wandb could not log in (wandb.errors.X: bad key): this run is kept offline\n"
    codes.append(3)
    assert wandb_mode("online") == "offline" and "no key" in capsys.readouterr().out


START = """
import helpers
{first}
from pathlib import Path
from types import SimpleNamespace
run = helpers.start_wandb(SimpleNamespace(config={{"Name": "x", "wandb": {mode!r}}}, folder=Path("run"),
    wandb_id="abcd", history=[{{"epoch": 1}}], model="Network()", details={{}}, group=None))
helpers.log_history(run, [{{"epoch": 1}}, {{"epoch": 2}}])
print("MODE", run.settings.mode)
run.finish()
"""
LOOPBACK = """
import fcntl, socket, struct
with socket.socket() as any_socket:  # it is up on any machine without a network
    fcntl.ioctl(any_socket, 0x8914, struct.pack("16sh14x", b"lo", 0x49))
"""


def start_in_a_process(mode, first, *prefix, **environment):
    """Start a run with the real wandb in a process of its own, after the lines `first`; prefix: of the command."""
    return subprocess.run([*prefix, sys.executable, "-c", START.format(mode=mode, first=first)], capture_output=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT), **environment}, text=True, timeout=150,
                          stdin=subprocess.DEVNULL)


@pytest.mark.skipif(sys.platform != "linux", reason="unshare is Linux's")
@pytest.mark.parametrize("place", ["environment", "netrc", "none"])
def test_a_key_and_no_connection_is_offline_and_no_key_is_too(tmp_path, place):
    if subprocess.run(["unshare", "-n", "true"], capture_output=True).returncode:
        pytest.skip("no permission to take a process's network away")
    key, host = "a" * 40, wandb.Settings().base_url.split("//")[1]
    if place == "netrc":  # of whatever server this version of wandb has
        (tmp_path / ".netrc").write_text(f"machine {host}\n  login user\n  password {key}\n")
        (tmp_path / ".netrc").chmod(0o600)
    # with a key the wait may be cut short; without one, wandb's answer is to be seen
    first = LOOPBACK + f"helpers.LOGIN_SECONDS = {60 if place == 'none' else 6}"
    environment = {"WANDB_API_KEY": key} if place == "environment" else {}
    result = start_in_a_process("auto", first, "unshare", "-n", **environment)
    assert result.returncode == 0 and "MODE offline" in result.stdout, result.stderr
    assert ("could not log in" in result.stdout) == (place != "none")
    assert rows_in(tmp_path / "run") == [{"epoch": 1}, {"epoch": 2}]
    assert key not in result.stdout + result.stderr


@pytest.mark.parametrize("mode", ["offline", "online"])
def test_a_service_that_does_not_start_does_not_stop_the_training(mode):
    result = start_in_a_process(mode, "helpers.wandb_mode = lambda choice: choice", WANDB_X_SERVICE_WAIT="0.001",
                                WANDB_API_KEY="a" * 40)
    assert result.returncode == 0 and "MODE disabled" in result.stdout, result.stderr
    assert result.stdout.count("training goes on without it") == 1


def fake_init(monkeypatch, refused):
    """Replace wandb.init: `refused` maps (mode, id) to an error. Returns the list of calls."""
    calls, files = [], Path("files")
    files.mkdir()

    def init(mode, id=None, resume=None, **_):
        calls.append((mode, id, resume))
        if error := refused(mode, id):
            raise error
        settings = SimpleNamespace(mode=mode)
        return SimpleNamespace(id=id, settings=settings, summary={}, dir=files, save=lambda *_, **__: 0)

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setattr(helpers, "wandb_mode", lambda choice: choice)
    return calls


def test_a_run_that_was_deleted_on_the_server_gets_a_new_id(tmp_path, monkeypatch, capsys):
    gone = wandb.errors.CommError("HTTP 409: run abcd was previously created and deleted; try a new run name\nmore")
    calls = fake_init(monkeypatch, lambda mode, run_id: gone if run_id == "abcd" else None)
    ours = run_of(tmp_path, [], wandb="online")
    run = start_wandb(ours)
    assert calls == [("online", "abcd", "allow"), ("online", run.id, "allow")] and run.id != "abcd"
    assert ours.wandb_id == run.id
    [line] = capsys.readouterr().out.splitlines()
    assert "409" in line and f"as the new run {run.id}" in line


def test_a_server_that_takes_nothing_leaves_the_run_offline(tmp_path, monkeypatch, capsys):
    calls = fake_init(monkeypatch, lambda mode, _: wandb.errors.CommError("500") if mode == "online" else None)
    start(tmp_path, [], wandb="online")
    assert [mode for mode, *_ in calls] == ["online", "online", "offline"] and calls[-1][2] is None
    assert "kept offline" in capsys.readouterr().out


# ---- Google Drive is there, or not -------------------------------------------------------------------------

def test_drive_is_mounted_on_colab_and_ignored_elsewhere(tmp_path, monkeypatch, capsys):
    assert open_drive(tmp_path, "run") is None and "ignored" in capsys.readouterr().out
    mounted = []
    colab(monkeypatch, drive=SimpleNamespace(mount=mounted.append))
    assert open_drive(tmp_path, "run") == Path("/content/drive/MyDrive/hw1p2-runs/run")
    assert mounted == ["/content/drive"]
    colab(monkeypatch, drive=SimpleNamespace(mount=Mock(side_effect=ValueError("mount failed"))))
    with pytest.raises(RunError, match=r"not be mounted \(ValueError: mount failed\).*again.*\['drive'\] = False"):
        open_drive(tmp_path, "run")


def test_on_colab_without_drive_it_is_reported_that_nothing_stays(monkeypatch):
    assert helpers.session_warning(drive=False, practice=False) == ""
    colab(monkeypatch)
    assert helpers.session_warning(drive=True, practice=False) == helpers.session_warning(False, practice=True) == ""
    assert "NOTHING HERE OUTLIVES" in helpers.session_warning(drive=False, practice=False)
