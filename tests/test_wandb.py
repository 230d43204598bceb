"""Folders, keys and wandb: its curves with the real library, and what happens without a network."""

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pandas as pd
import pytest
import wandb
from support.notebook import ROOT
from support.wandb_runs import (
    CONFIG,
    ROWS,
    finished_records,
    log,
    results_of,
    rows_in,
    run_of,
    without_wandbs_own,
)
from support.wandb_server import WandbServer

import helpers
from helpers import (
    RunError,
    cache_folder,
    finish_wandb,
    load_secrets,
    log_history,
    open_drive,
    runs_folder,
    start_wandb,
    wandb_mode,
)


@pytest.fixture(autouse=True)
def plain_environment(tmp_path, monkeypatch):
    """No keys or settings of whoever runs the tests, no Colab or Kaggle, no run that is open."""
    for name in [
        name for name in os.environ if name.startswith(("WANDB", "HW1P2", "KAGGLE", "NETRC"))
    ]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(helpers, "KAGGLE", tmp_path / "kaggle")
    monkeypatch.chdir(tmp_path)
    yield
    if wandb.run is not None:
        wandb.run.finish()


@pytest.fixture
def server(plain_environment, monkeypatch):
    """A server that takes everything, and a key for it."""
    server = WandbServer()
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    wandb.teardown()  # what it knows of an earlier test's environment
    yield server
    helpers._stop_wandb()
    server.close()


def colab(monkeypatch, **modules):
    """This process as one of Colab's: google.colab with these attributes."""
    monkeypatch.setitem(sys.modules, "google.colab", SimpleNamespace(**modules))


def start(*arguments, **changes):
    run = run_of(*arguments, **changes)
    start_wandb(run)
    return run


# ---- Folders -------------------------------------------------------------------------------------


def test_runs_go_where_the_environment_says_else_where_kaggle_keeps_them_else_here(
    tmp_path, monkeypatch
):
    assert runs_folder() == Path("runs")
    (helpers.KAGGLE / "working").mkdir(parents=True)
    assert runs_folder() == helpers.KAGGLE / "working" / "runs"
    monkeypatch.setenv("PLACE", "elsewhere")
    for text, path in [
        ("elsewhere", "elsewhere"),
        ("~/my runs", tmp_path / "my runs"),
        ("$PLACE/x", "elsewhere/x"),
        ("${PLACE}", "elsewhere"),
        (' "a b" ', "a b"),
        ("'~/x'\n", tmp_path / "x"),
    ]:
        monkeypatch.setenv("HW1P2_RUNS", text)
        assert runs_folder() == Path(path)
    monkeypatch.setenv("HW1P2_RUNS", "~nosuchuser/x")
    with pytest.raises(
        RunError, match="HW1P2_RUNS is ~nosuchuser/x: there is no home directory for ~nosuchuser"
    ):
        runs_folder()
    for empty in ("", "  ", '""'):
        monkeypatch.setenv("HW1P2_RUNS", empty)
        assert runs_folder() == helpers.KAGGLE / "working" / "runs"


def test_the_cache_is_neither_in_kaggles_saved_output_nor_on_drive(tmp_path, monkeypatch):
    assert cache_folder("runs") == Path("runs/cache")
    assert (
        cache_folder(helpers.KAGGLE / "working" / "runs") == helpers.KAGGLE / "temp" / "hw1p2-cache"
    )
    assert (
        cache_folder(helpers.KAGGLE / "temp" / "runs") == helpers.KAGGLE / "temp" / "runs" / "cache"
    )
    assert cache_folder("/content/drive/MyDrive/runs") == Path("/content/hw1p2-cache")
    assert cache_folder("/content/runs") == Path("/content/runs/cache")
    (helpers.KAGGLE / "working").mkdir(parents=True)
    monkeypatch.chdir(helpers.KAGGLE / "working")
    assert cache_folder("runs") == helpers.KAGGLE / "temp" / "hw1p2-cache"


# ---- Keys ----------------------------------------------------------------------------------------


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


def test_a_secret_that_never_comes_stops_neither_the_notebook_nor_those_before_it(monkeypatch):
    never = threading.Event()
    colab(
        monkeypatch,
        userdata=SimpleNamespace(get=lambda name: never.wait() if name == "A" else "not-a-key"),
    )
    load_secrets("KAGGLE_KEY", "A", seconds=0.5)
    assert os.environ["KAGGLE_KEY"] == "not-a-key" and "A" not in os.environ
    never.set()


# ---- Curves --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_epoch_is_in_the_curves_once_whatever_is_logged_between(tmp_path, capfd):
    run = start(tmp_path, [])
    for done in (1, 2, 3):
        log(run, ROWS[:done])
        log(run, ROWS[:done])  # again after an interrupt
        if done == 2:
            run.wandb.log({"chart": 7})
    run.wandb.summary.update({"best_epoch": 2, "best_val_acc": 0.2})
    run.wandb.log({"confusion": 1})
    again = start(tmp_path, ROWS[:4], epochs=5)  # more epochs, in the same session
    assert again.wandb is run.wandb and run.wandb.config["epochs"] == 5
    log(run, ROWS)
    finish_wandb(run)
    assert rows_in(tmp_path) == [*ROWS[:2], {"chart": 7}, ROWS[2], {"confusion": 1}, *ROWS[3:]]
    metrics = {
        record.metric.name: record.metric.step_metric
        for record in finished_records(tmp_path)
        if record.WhichOneof("record_type") == "metric"
    }
    assert {name: metrics[name] for name in ("val_acc", "seconds")} == {
        "val_acc": "epoch",
        "seconds": "epoch",
    }
    output = capfd.readouterr()
    assert output.out.count("wandb is offline") == 2 and output.err == ""


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["offline", "online"])
def test_a_users_own_rows_with_an_epoch_do_not_replace_ours(tmp_path, server, mode):
    run, theirs = start(tmp_path, [], wandb=mode), []
    for row in ROWS[:3]:
        for epoch in (
            row["epoch"],
            150,
        ):  # in the loop: this epoch, and for whatever reason a later one
            theirs.append({"epoch": epoch, "gradient norm": 2.5})
            run.wandb.log(theirs[-1])
        log(run, ROWS[: row["epoch"]])
    finish_wandb(run)
    rows = rows_in(tmp_path) if mode == "offline" else [*map(without_wandbs_own, server.rows)]
    assert [row for row in rows if "gradient norm" not in row] == ROWS[:3]
    assert [row for row in rows if "gradient norm" in row] == theirs


@pytest.mark.slow
def test_a_second_session_has_the_earlier_ones_epochs_too(tmp_path):
    finish_wandb(start(tmp_path, ROWS[:2]))
    assert rows_in(tmp_path) == ROWS[:2]
    run = start(tmp_path, ROWS[:2])
    log(run, ROWS[:3])
    finish_wandb(run)
    assert run.wandb.id == "abcd" and rows_in(tmp_path) == ROWS[:3]


def test_the_server_gets_what_it_has_not_got(tmp_path):
    logged = []
    run = run_of(tmp_path, ROWS[:3])
    run.wandb = SimpleNamespace(
        summary={"epochs_sent": 1, "epoch": 150},
        log=logged.append,
        define_metric=lambda *_, **__: 0,
        settings=SimpleNamespace(mode="online"),
    )
    log_history(run)
    assert logged == ROWS[1:3]


@pytest.mark.slow
def test_another_run_that_is_open_is_finished_first(tmp_path):
    first = start(tmp_path / "a", ROWS[:1])
    second = start(tmp_path / "b", ROWS[:2], "other")
    assert wandb.run is second.wandb and second.wandb.id == "other"
    finish_wandb(second)
    assert rows_in(tmp_path / "a") == ROWS[:1] and rows_in(tmp_path / "b") == ROWS[:2]
    with pytest.raises(wandb.errors.UsageError):
        first.wandb.log({"x": 1})


@pytest.mark.slow
def test_the_network_is_kept_with_the_run(tmp_path):
    finish_wandb(start(tmp_path / "run (1)", []))
    assert (tmp_path / "run (1)" / "model_arch.txt").read_text(
        "utf-8"
    ) == "Network(\n  (0): Linear()\n)"
    [kept] = (tmp_path / "run (1)" / "wandb").glob("offline-run-*/files/model_arch.txt")
    assert (
        not kept.is_symlink()
        and kept.read_text() == (tmp_path / "run (1)" / "model_arch.txt").read_text()
    )
    saved = [
        file.path
        for record in finished_records(tmp_path / "run (1)")
        for file in record.files.files
    ]
    assert "model_arch.txt" in saved


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["offline", "disabled"])
def test_what_a_run_gave_is_in_its_own_folder_with_wandb_or_without(tmp_path, mode):
    run = start(tmp_path, ROWS[:2], wandb=mode)
    results = results_of(tmp_path)
    helpers.save_results(run, results)
    finish_wandb(run, results, tmp_path / "submission.csv")
    assert pd.read_csv(tmp_path / "history.csv").to_dict("records") == ROWS[:2]
    start(tmp_path, [], wandb=mode, run_id="new")  # its checkpoint was deleted
    assert not (tmp_path / "history.csv").exists()
    confusion = pd.read_csv(tmp_path / "confusion.csv", index_col="true")
    assert list(confusion) == list(confusion.index) == helpers.PHONEMES
    assert (confusion.to_numpy() == results.confusion).all()
    assert pd.read_csv(tmp_path / "by_phoneme.csv", keep_default_na=False)["phoneme"].tolist() == [
        *results.by_phoneme["phoneme"]
    ]
    numbers = json.loads((tmp_path / "results.json").read_text())
    assert numbers == {
        "best_epoch": 2,
        "best_val_acc": 0.2,
        "best_val_loss": 1.5,
        "best_train_acc": 0.1,
        "val_acc, frame alone": 0.2,
        "test_acc": 0.25,
    }


def test_disabled_it_does_nothing_and_everything_can_be_called(tmp_path, monkeypatch):
    for name in ("init", "Settings", "setup"):
        monkeypatch.setattr(wandb, name, Mock(side_effect=AssertionError("wandb is asked")))
    run = start(tmp_path, ROWS[:2], wandb="disabled")
    log(run, ROWS[:3])
    run.wandb.summary.update({"x": 1})
    run.wandb.summary["y"] = 2
    run.wandb.log({"chart": 1})
    run.wandb.watch(run.model, log="all")
    finish_wandb(run, results_of(tmp_path), tmp_path / "submission.csv")
    assert not (tmp_path / "wandb").exists() and run.wandb.settings.mode == "disabled"
    assert run.message == "wandb is disabled\n"


@pytest.mark.slow
def test_disabled_a_users_own_call_of_wandb_does_nothing_either(tmp_path):
    start(tmp_path, [], wandb="disabled")
    wandb.log({"x": 1})
    run = start(tmp_path, ROWS[:1])  # and the next run is an ordinary one
    wandb.log({"x": 1})
    finish_wandb(run)
    assert rows_in(tmp_path) == [ROWS[0], {"x": 1}]


@pytest.mark.slow
def test_the_command_that_uploads_a_run_can_be_pasted_and_uploads_it(tmp_path, server):
    run = start(tmp_path / "exp 1 (lr=0.01)", ROWS[:2])
    finish_wandb(run)
    [line] = [line for line in run.message.splitlines() if "upload" in line]
    command = shlex.split(line)[-3:]
    assert command[:2] == ["wandb", "sync"]
    subprocess.run([sys.executable, "-m", *command], check=True, timeout=120, capture_output=True)
    assert [*map(without_wandbs_own, server.rows)] == ROWS[:2]


@pytest.mark.slow
def test_project_and_name_are_the_environments_where_they_are_set(tmp_path, monkeypatch):
    run = start(tmp_path / "a", []).wandb
    assert (run.project, run.name) == ("hw1p2", CONFIG["Name"])
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.setenv("WANDB_NAME", "a name")
    run = start(tmp_path / "b", [], "other").wandb
    assert (run.project, run.name) == ("mine", "a name")


@pytest.mark.slow
def test_a_run_that_a_sweep_has_opened_gets_the_whole_config_and_the_network(tmp_path, capfd):
    given = wandb.init(mode="offline", dir=tmp_path)
    given.config.update_locked({"epochs": 3, "x": 1}, user="sweep")
    run = run_of(tmp_path / "run", ROWS[:2])
    start_wandb(run, given)
    assert run.wandb is given
    assert (
        given.config["Name"] == CONFIG["Name"]
        and given.config["device"] == "é"
        and given.config["x"] == 1
    )
    assert "locked" not in "".join(capfd.readouterr())  # as wandb says of what is set again
    given.finish()
    assert rows_in(tmp_path) == ROWS[:2]
    [kept] = tmp_path.glob("wandb/offline-run-*/files/model_arch.txt")
    assert (
        kept.read_text()
        == (tmp_path / "run" / "model_arch.txt").read_text()
        == "Network(\n  (0): Linear()\n)"
    )


# ---- Online or offline ---------------------------------------------------------------------------


def mode_of(choice):
    run = SimpleNamespace(config={"wandb": choice}, message="")
    return wandb_mode(run), run.message


def test_the_mode_is_the_configs_then_the_environments_then_what_wandb_finds(monkeypatch):
    codes, environments = [], []

    def run(command, env, **_):
        environments.append(env)
        return SimpleNamespace(returncode=codes.pop(), stdout="bad key\n")

    monkeypatch.setattr(subprocess, "run", run)
    assert [mode_of(choice) for choice in ("offline", "disabled")] == [
        ("offline", ""),
        ("disabled", ""),
    ]
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert [mode_of(choice)[0] for choice in ("auto", "offline")] == ["disabled", "offline"]
    codes.append(0)
    assert mode_of("online") == ("online", "") and environments[-1]["WANDB_MODE"] == "online"
    monkeypatch.delenv("WANDB_MODE")
    codes += [1, 3, 0]
    assert [mode_of("auto") for _ in range(3)] == [
        ("online", ""),
        ("offline", ""),
        ("offline", "wandb could not log in (bad key): this run is kept offline\n"),
    ]
    codes += [4, 3]
    assert mode_of("online") == (
        "offline",
        "wandb could not log in (no key): this run is kept offline\n",
    )
    assert "(no answer in 25 s)" in mode_of("online")[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "text, mode",
    [
        ("Offline", "offline"),
        (" DISABLED ", "disabled"),
        ("'offline'", "offline"),
        ("dryrun", "offline"),
        ('"DryRun"', "offline"),
    ],
)
def test_the_environments_mode_may_be_written_in_any_way(tmp_path, monkeypatch, text, mode):
    monkeypatch.setenv("WANDB_MODE", text)
    run = start(tmp_path / "auto", ROWS[:1], wandb="auto")
    finish_wandb(run)
    assert run.wandb.settings.mode == mode and ("wandb sync" in run.message) == (mode == "offline")
    monkeypatch.setenv("WANDB_MODE", text)
    run = start(tmp_path / "offline", ROWS[:1], wandb="offline")
    finish_wandb(run)
    assert rows_in(tmp_path / "offline") == ROWS[:1]


@pytest.mark.slow
def test_a_mode_that_wandb_does_not_know_is_ignored_with_a_word(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "of")
    run = start(tmp_path, ROWS[:1], wandb="offline")
    finish_wandb(run)
    assert "WANDB_MODE=of is ignored: expected online, offline or disabled\n" in run.message
    assert rows_in(tmp_path) == ROWS[:1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "key, words", [("short", "API key must"), ("a" * 40, "API key|authenticate|credentials")]
)
def test_why_a_login_failed_is_wandbs_own_sentence(monkeypatch, server, key, words):
    monkeypatch.setenv("WANDB_API_KEY", key)
    server.refuses["viewer"] = "the key is not known"
    mode, message = mode_of("auto")
    assert mode == "offline" and "pydantic" not in message and key not in message
    assert message.startswith("wandb could not log in (") and helpers.re.search(words, message), (
        message
    )


@pytest.mark.slow
def test_a_login_without_an_answer_has_an_end(monkeypatch, server):
    monkeypatch.setattr(helpers, "LOGIN_SECONDS", 2)  # counted from when wandb is loaded
    server.hangs_at = lambda request: True
    assert mode_of("auto") == (
        "offline",
        "wandb could not log in (no answer in 2 s): this run is kept offline\n",
    )


START = """
import sys
import helpers
{first}
sys.path.insert(0, {tests!r})
from pathlib import Path
from support.wandb_runs import ROWS, log, results_of, run_of
from helpers import finish_wandb, start_wandb
run = run_of(Path("run"), ROWS[:1], wandb={mode!r})
start_wandb(run)
{then}
log(run, ROWS[:2])
results = results_of(run.folder)
finish_wandb(run, results, run.folder / "submission.csv")
print("MODE", run.wandb.settings.mode)
"""
LOOPBACK = """
import fcntl, socket, struct
with socket.socket() as any_socket:  # it is up on any machine without a network
    fcntl.ioctl(any_socket, 0x8914, struct.pack("16sh14x", b"lo", 0x49))
"""


def start_in_a_process(mode, first, *prefix, then="", during=lambda: None, **environment):
    """A run with the real wandb in a process of its own.

    first: lines of code before its start. then: lines after it. prefix: of the command.
    during: called when the process prints a line that begins with READY; after it, it goes on.
    """
    process = subprocess.Popen(
        [
            *prefix,
            sys.executable,
            "-c",
            START.format(mode=mode, first=first, then=then, tests=str(ROOT / "tests")),
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    killer = threading.Timer(240, process.kill)  # a test must not wait for ever either
    killer.start()
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("READY"):
            during()
            process.stdin.write("\n")
            process.stdin.flush()
    process.stdin.close()
    error = process.stderr.read()
    process.wait()
    killer.cancel()
    return SimpleNamespace(returncode=process.returncode, stdout="".join(lines), stderr=error)


@pytest.mark.slow
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
    first = LOOPBACK + f"helpers.LOGIN_SECONDS = {60 if place == 'none' else 2}"
    environment = {"WANDB_API_KEY": key} if place == "environment" else {}
    result = start_in_a_process("auto", first, "unshare", "-n", **environment)
    assert result.returncode == 0 and "MODE offline" in result.stdout, result.stderr
    assert ("could not log in" in result.stdout) == (place != "none")
    assert rows_in(tmp_path / "run")[:2] == ROWS[:2]
    assert key not in result.stdout + result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["offline", "online"])
def test_a_service_that_does_not_start_does_not_stop_the_training(mode):
    result = start_in_a_process(
        mode,
        "helpers.wandb_mode = lambda run: run.config['wandb']",
        WANDB_X_SERVICE_WAIT="0.001",
        WANDB_API_KEY="a" * 40,
    )
    assert result.returncode == 0 and "MODE disabled" in result.stdout, result.stderr
    assert result.stdout.count("training goes on without it") == 1


# ---- The connection is lost ----------------------------------------------------------------------

LOSE = "print('READY', flush=True); sys.stdin.readline()"


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ends", "hangs"])
def test_a_connection_that_is_lost_in_training_costs_some_time_and_no_result(tmp_path, server, way):
    """Of a run in a process of its own, which comes to its end."""

    def lose():
        if way == "ends":
            server.close()
        else:
            server.hangs_at = lambda request: True

    limits = "helpers.WANDB_SECONDS, helpers.UPLOAD_SECONDS, helpers.LAST_SECONDS = 20, 10, 3"
    result = start_in_a_process("online", limits, then=LOSE, during=lose)
    assert result.returncode == 0 and "MODE offline" in result.stdout, (
        result.stdout,
        result.stderr,
    )
    assert f"wandb is online: {server.url}" in result.stdout
    assert (
        "what is not uploaded yet is kept offline" in result.stdout
        and "wandb sync" in result.stdout
    )
    assert [row for row in rows_in(tmp_path / "run") if "epoch" in row] == ROWS[:2]
    assert any("confusion_matrix_table" in row for row in rows_in(tmp_path / "run"))


@pytest.mark.slow
@pytest.mark.parametrize("way", ["hangs", "refuses"])
def test_a_run_that_the_server_does_not_create_is_kept_offline_under_its_own_id(
    tmp_path, server, monkeypatch, way
):
    monkeypatch.setattr(helpers, "WANDB_SECONDS", 8)
    if way == "hangs":
        server.hangs_at = lambda request: "upsertBucket" in request
    else:
        server.refuses["upsertBucket"] = "permission denied"
    run = start(tmp_path, ROWS[:2], wandb="online")
    finish_wandb(run)
    assert run.wandb.settings.mode == "offline" and run.wandb.id == run.wandb_id == "abcd"
    assert "is kept offline\nwandb is offline\n" in run.message and "deleted" not in run.message
    assert rows_in(tmp_path) == ROWS[:2]


@pytest.mark.slow
def test_a_run_that_is_online_has_its_curves_and_its_results_on_the_server(tmp_path, server):
    run = start(tmp_path, ROWS[:2], wandb="online")
    log(run, ROWS[:3])
    finish_wandb(run, results_of(tmp_path), tmp_path / "submission.csv")
    *rows, results = map(without_wandbs_own, server.rows)
    assert rows == ROWS[:3] and {"by_phoneme", "confusion_matrix_table"} <= set(results)
    assert any("CreateArtifact" in request and "-abcd" in request for request in server.requests)
    assert run.message == f"wandb is online: {server.url}/student/hw1p2/runs/abcd\n"


@pytest.mark.slow
def test_a_server_that_refuses_the_results_has_the_curves(tmp_path, server, monkeypatch):
    monkeypatch.setattr(
        helpers, "_send_results", Mock(side_effect=[RuntimeError("no artifacts here"), None])
    )
    run = start(tmp_path, ROWS[:2], wandb="online")
    finish_wandb(run, results_of(tmp_path), tmp_path / "submission.csv")
    assert [*map(without_wandbs_own, server.rows)] == rows_in(tmp_path) == ROWS[:2]
    assert "wandb fails (no artifacts here)" in run.message and "wandb sync" in run.message


def test_a_call_that_never_ends_is_given_up_and_the_next_one_is_not_kept_waiting(monkeypatch):
    never = threading.Event()
    with pytest.raises(TimeoutError, match="no answer in 0.05 s"):
        helpers.within(0.05, never.wait)
    late = []
    with pytest.raises(TimeoutError):  # it waits for the first one, and is not made up for later
        helpers.within(0.05, late.append, 1)
    helpers._stop_wandb()
    assert helpers.within(60, lambda: 7) == 7
    never.set()
    assert helpers.within(60, lambda: 8) == 8 and late == []


def test_a_stop_does_not_cut_off_what_wandb_is_doing():
    going, go_on, done = threading.Event(), threading.Event(), []

    def start():
        going.set()
        go_on.wait()
        done.append("started")

    def stop():
        going.wait()
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            threading.Thread(target=stop).start()
            helpers.within(60, start)
    finally:
        signal.signal(signal.SIGINT, before)
    threading.Timer(0.05, go_on.set).start()
    assert helpers.within(60, lambda: [*done]) == [
        "started"
    ]  # one at a time: the next call waits for it


def fake_init(monkeypatch, refused):
    """Replace wandb.init: `refused` maps (mode, id) to an error. Returns the list of calls."""
    calls, files = [], Path("files")
    files.mkdir()

    def init(mode, id=None, resume=None, **_):
        calls.append((mode, id, resume))
        if error := refused(mode, id):
            raise error
        settings = SimpleNamespace(mode=mode)
        return SimpleNamespace(
            id=id,
            settings=settings,
            summary={},
            config={},
            dir=files,
            url="https://x",
            save=lambda *_, **__: 0,
        )

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setattr(helpers, "wandb_mode", lambda run: run.config["wandb"])
    return calls


def test_a_run_that_was_deleted_on_the_server_gets_a_new_id(tmp_path, monkeypatch):
    gone = wandb.errors.CommError(
        "HTTP 409: run abcd was previously created and deleted; try a new run name\nmore"
    )
    calls = fake_init(monkeypatch, lambda mode, run_id: gone if run_id == "abcd" else None)
    run = start(tmp_path, [], wandb="online")
    assert (
        calls == [("online", "abcd", "allow"), ("online", run.wandb.id, "allow")]
        and run.wandb.id != "abcd"
    )
    assert run.wandb_id == run.wandb.id
    first, second = run.message.splitlines()
    assert (
        "409" in first
        and f"as the new run {run.wandb_id}" in first
        and second == "wandb is online: https://x"
    )


def test_an_id_that_a_stopped_start_still_holds_is_free_at_the_second_try(tmp_path, monkeypatch):
    errors = [wandb.errors.CommError('run ID "abcd" is in use')]
    calls = fake_init(monkeypatch, lambda *_: errors.pop() if errors else None)
    run = start(tmp_path, [], wandb="online")
    assert (
        calls == 2 * [("online", "abcd", "allow")] and run.message == "wandb is online: https://x\n"
    )


def test_a_server_that_takes_nothing_leaves_the_run_offline(tmp_path, monkeypatch):
    gone = wandb.errors.CommError("HTTP 409: deleted")
    calls = fake_init(monkeypatch, lambda mode, _: gone if mode == "online" else None)
    run = start(tmp_path, [], wandb="online")
    assert [mode for mode, *_ in calls] == ["online", "online", "offline"] and calls[-1][2] is None
    assert "kept offline" in run.message and calls[-1][1] == run.wandb_id


@pytest.mark.parametrize(
    "error",
    [
        AttributeError("type object 'Settings' has no attribute 'model_fields'"),
        TypeError("str expected"),
        SystemExit(1),
    ],
)
def test_a_wandb_that_is_too_old_or_broken_does_not_stop_the_training(tmp_path, monkeypatch, error):
    fake_init(monkeypatch, lambda *_: error)
    run = start(tmp_path, ROWS[:1], wandb="offline")
    log(run, ROWS[:2])
    finish_wandb(run, results_of(tmp_path), tmp_path / "submission.csv")
    assert (
        str(error) in run.message
        and "training goes on without it\nwandb is disabled\n" in run.message
    )
    assert len(pd.read_csv(tmp_path / "history.csv")) == 2


# ---- Google Drive is there, or not ---------------------------------------------------------------


def test_drive_is_mounted_on_colab_and_ignored_elsewhere(tmp_path, monkeypatch):
    run = run_of(tmp_path, [])
    assert open_drive(run, "run") is None and "is ignored here" in run.message
    mounted = []
    colab(monkeypatch, drive=SimpleNamespace(mount=mounted.append))
    assert open_drive(run, "run") == Path("/content/drive/MyDrive/hw1p2-runs/run")
    assert mounted == ["/content/drive"]
    colab(monkeypatch, drive=SimpleNamespace(mount=Mock(side_effect=ValueError("mount failed"))))
    with pytest.raises(
        RunError, match=r"not be mounted \(ValueError: mount failed\).*again.*\['drive'\] = False"
    ):
        open_drive(run, "run")


def test_on_colab_without_drive_it_is_reported_that_nothing_stays(monkeypatch):
    assert helpers.session_warning(drive=False, practice=False) == ""
    colab(monkeypatch)
    assert (
        helpers.session_warning(drive=True, practice=False)
        == helpers.session_warning(False, practice=True)
        == ""
    )
    assert "NOTHING HERE OUTLIVES" in helpers.session_warning(drive=False, practice=False)
