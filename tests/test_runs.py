"""Finished runs: loaded by their name, put together, started from, and compared."""

import re
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from support import kills
from support.configs import QUICK
from support.notebook import (
    RESULTS,
    SUBMISSION,
    TRAINING,
    Session,
    code_cells,
    notebook_cells,
    notebook_text,
    python_blocks,
)

import helpers
from helpers import RunError

PHONEMES = np.array(helpers.PHONEMES)


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    """(Runs folder, session) with two finished runs, of the seeds 23 and 24.

    The second epoch of the first run is worse than its first.
    """
    runs = tmp_path_factory.mktemp("trained")
    session = Session(runs, corpus, QUICK)
    session.run_all(until=TRAINING)
    session.run("def evaluate_best")
    run_epoch = session["run_epoch"]

    def worse(run, epoch):
        row = run_epoch(run, epoch)
        return {**row, "val_acc": row["val_acc"] - (epoch == 2)}

    session.namespace["run_epoch"] = worse
    session.run(TRAINING, RESULTS, SUBMISSION)
    session.namespace["run_epoch"] = run_epoch
    session["config"].update(Name="24", seed=24)
    session.run(TRAINING, RESULTS)
    return runs, session


def new_session(runs):
    """A session without training data, in which only what the notebook asks for was run."""
    session = Session(runs, "nowhere", QUICK)
    sources = {}
    for cell in notebook_cells():
        source = "".join(cell["source"])
        if heading := re.match(r"## (\d+)\.", source):
            section = int(heading[1])
        elif cell["cell_type"] == "code":
            sources.setdefault(section, []).append(source)
    network = next(i for i, source in enumerate(sources[4]) if "def make_network" in source)
    session.execute(
        *sources[1], *sources[2], *sources[4][: network + 1], *sources[6], sources[11][-1]
    )
    return session


def weights(model):
    return kills.frozen(helpers.weights_of(model))


# ---- Which weights are in the model --------------------------------------------------------------


@pytest.mark.slow
def test_after_training_and_for_a_finished_run_the_model_has_the_best_weights(
    trained, corpus, tmp_path, capsys
):
    runs = shutil.copytree(trained[0], tmp_path / "runs")
    best = kills.frozen(helpers.load_checkpoint(runs / "pencil" / "best.pt")["model"])
    last = kills.frozen(helpers.load_checkpoint(runs / "pencil" / "checkpoint.pt")["model"])
    assert best != last
    session = Session(runs, corpus, QUICK)
    session.run_all(until=TRAINING)
    run = session.call("make_run", session["config"])
    assert weights(run.model) == best
    assert "nothing left to train; the weights are those of the best one, epoch 1" in run.message
    session.run(TRAINING)
    assert weights(session["model"]) == best
    assert "finished: `model` has the weights of epoch 1, the best one" in capsys.readouterr().out


@pytest.mark.slow
def test_an_unfinished_run_has_the_weights_of_its_last_epoch(corpus, tmp_path):
    session = Session(tmp_path, corpus, {**QUICK, "epochs": 3})
    session.run_all(until=TRAINING)
    run_epoch = session["run_epoch"]

    def stop(run, epoch):
        if epoch == 3:
            raise KeyboardInterrupt
        return {**run_epoch(run, epoch), "val_acc": 1 / epoch}

    session.namespace["run_epoch"] = stop
    with pytest.raises(KeyboardInterrupt):
        session.run(TRAINING)
    run = session.call("make_run", session["config"])
    assert weights(run.model) == kills.frozen(
        helpers.load_checkpoint(tmp_path / "pencil" / "checkpoint.pt")["model"]
    )
    assert "2 of 3 epochs are done, resuming" in run.message


# ---- A finished run by its name ------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_is_loaded_and_predicts_without_the_training_data(trained, corpus, tmp_path):
    runs, _ = trained
    shutil.copytree(corpus / "test-clean", tmp_path / "new" / "test-clean")
    session = new_session(runs)
    run = session.call("load_run", "pencil")
    assert run.config == helpers.load_checkpoint(runs / "pencil" / "checkpoint.pt")["config"]
    loader = session.call("open_folder", run, tmp_path / "new")
    submitted = helpers.read_submission(runs / "pencil" / "submission.csv")
    assert np.array_equal(session.call("test", run, loader), submitted)


@pytest.mark.slow
def test_its_decoder_is_that_of_the_results(trained, corpus):
    runs, trainer = trained
    session = new_session(runs)
    run = session.call("load_run", "24")
    tuned = trainer["results"].decoder
    assert (run.decoder.prior_scale, run.decoder.transition_weight) == (
        tuned.prior_scale,
        tuned.transition_weight,
    )
    loader = session.call("open_folder", run, corpus, "dev-clean")
    log_posteriors = session.call("log_probabilities", run, loader)
    assert torch.equal(
        run.decoder(log_posteriors, loader.dataset.offsets),
        tuned(log_posteriors, loader.dataset.offsets),
    )


@pytest.mark.slow
def test_an_ensemble_as_the_notebook_shows_it(trained, corpus):
    runs, _ = trained
    session = new_session(runs)
    text = notebook_text()
    [code] = [block for block in python_blocks(text) if "members = [" in block]
    session.namespace["data_folder"] = corpus
    session.execute(code.replace('("pencil", "pencil-24", "pencil-25")', '("pencil", "24")'))
    single = [
        session.call("log_probabilities", run, session.call("open_folder", run, corpus))
        for run in session["members"]
    ]
    expected = PHONEMES[((single[0] + single[1]) / 2).argmax(1)]
    assert np.array_equal(helpers.read_submission(runs / "ensemble.csv"), expected)
    assert "parameters count those of all its networks together" in " ".join(text.split())


@pytest.mark.slow
def test_a_run_that_is_not_there_is_named_with_those_that_are(trained):
    session = new_session(trained[0])
    with pytest.raises(RunError, match="no best weights are there; the runs are: 24, pencil"):
        session.call("load_run", "pencil-25")


@pytest.mark.slow
def test_a_run_of_another_network_is_not_loaded(trained):
    session = new_session(trained[0])
    [source] = [source for source in code_cells() if "class Network" in source]
    session.execute(source.replace("self.model(frames", "-self.model(frames"))
    with pytest.raises(RunError, match="`Network.forward` has changed"):
        session.call("load_run", "pencil")


@pytest.mark.slow
def test_a_run_is_loaded_whose_training_has_changed(trained, corpus):
    session = new_session(trained[0])
    [source] = [source for source in code_cells() if "def train(" in source]
    session.execute(source.replace("< 0.7", "< 0.5"))
    session.call("load_run", "pencil")


@pytest.mark.slow
def test_a_run_without_results_has_no_decoder(trained, tmp_path):
    runs = shutil.copytree(trained[0], tmp_path / "runs")
    (runs / "pencil" / "decoder.pt").unlink()
    assert new_session(runs).call("load_run", "pencil").decoder is None


# ---- What is thrown away -------------------------------------------------------------------------


@pytest.mark.slow
def test_a_learning_rate_or_weights_set_by_hand_are_not_used_and_that_is_said(
    corpus, tmp_path, capsys
):
    session = Session(
        tmp_path, corpus, {**QUICK, "epochs": 1, "scheduler": "steplr", "dropout_scale": 1}
    )
    session.run_all(until=TRAINING)
    run = session.call("make_run", session["config"])
    run.optimizer.param_groups[0]["lr"] = 7.0
    with torch.no_grad():
        next(run.model.parameters()).zero_()
    session.call("fit", run)
    assert (
        "the learning rate and the weights set by hand: not used, see section 7"
        in capsys.readouterr().out
    )
    assert run.history[0]["learning_rate"] < 1
    fresh = session.call(
        "make_run", session["config"]
    )  # what the run itself has changed is nobody's hand
    session.run("def evaluate_best")
    session.call("evaluate_best", fresh)
    fresh.config["epochs"] = 2
    session.call("fit", fresh)
    session.call("fit", fresh)
    assert len(fresh.history) == 2 and "by hand" not in fresh.message


@pytest.mark.slow
def test_what_an_interrupted_epoch_has_changed_is_not_by_hand(corpus, tmp_path):
    session = Session(tmp_path, corpus, {**QUICK, "epochs": 1})
    session.run_all(until=TRAINING)
    run, train = session.call("make_run", session["config"]), session["train"]

    def interrupted(run):
        train(run)
        raise KeyboardInterrupt

    session.namespace["run_epoch"] = lambda run, epoch: interrupted(run)
    with pytest.raises(KeyboardInterrupt):
        session.call("fit", run)
    with pytest.raises(KeyboardInterrupt):
        session.call("fit", run)
    assert "by hand" not in run.message


# ---- Started from another run --------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_starts_from_the_best_weights_of_another(trained, corpus, tmp_path):
    runs = shutil.copytree(trained[0], tmp_path / "runs")
    session = Session(runs, corpus, {**QUICK, "Name": "further", "start_from": "pencil"})
    session.run_all(until=TRAINING)
    session.call("make_run", session["config"])
    start = kills.frozen(helpers.load_checkpoint(runs / "further" / "checkpoint.pt")["model"])
    assert start == kills.frozen(helpers.load_checkpoint(runs / "pencil" / "best.pt")["model"])
    shutil.rmtree(runs / "pencil")  # to resume, it needs the other one no more
    session.run(TRAINING)
    history = helpers.load_checkpoint(runs / "further" / "checkpoint.pt")["history"]
    fresh = helpers.load_checkpoint(runs / "24" / "checkpoint.pt")["history"]
    assert len(history) == 2 and history[0]["train_loss"] < fresh[0]["train_loss"] - 0.2
    session["config"]["start_from"] = None
    with pytest.raises(RunError, match="start_from: 'pencil' there, None now"):
        session.run(TRAINING)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes, told",
    [
        ({"start_from": "nobody"}, "nobody: best.pt is not there"),
        ({"start_from": "pencil", "context": 6}, "another network.*size mismatch"),
    ],
)
def test_a_start_that_does_not_fit_is_named_and_leaves_no_run(
    trained, corpus, tmp_path, changes, told
):
    runs = shutil.copytree(trained[0], tmp_path / "runs")
    session = Session(runs, corpus, {**QUICK, "Name": "further", **changes})
    session.run_all(until=TRAINING)
    with pytest.raises(RunError, match=f"(?s){told}"):
        session.run(TRAINING)
    assert not (runs / "further" / "checkpoint.pt").exists()


@pytest.mark.parametrize(
    "value, good",
    [
        (None, True),
        ("a", True),
        ("a/variants/lr=1", True),
        ("../a", False),
        ("a//b", False),
        ("", False),
        (3, False),
    ],
)
def test_the_run_to_start_from_is_a_name_or_none(value, good):
    options = {"start_from": [None, str]}
    if good:
        assert helpers.check_config({"start_from": value}, options) == {"start_from": value}
    else:
        with pytest.raises(ValueError, match="allowed: None, the name of a run"):
            helpers.check_config({"start_from": value}, options)


# ---- Runs side by side ---------------------------------------------------------------------------


def history_of(*accuracies):
    return [
        {"epoch": i + 1, "val_acc": accuracy, "train_acc": accuracy / 2}
        for i, accuracy in enumerate(accuracies)
    ]


def test_the_runs_so_far_with_what_differs(tmp_path, capsys):
    config = {"Name": "x", "epochs": 3, "dropout": 0.2, "warp": 0.2, "wandb": "auto"}
    for name, changes, history in (
        ("a", {}, history_of(0.5, 0.7, 0.6)),
        ("b", {"dropout": 0.1}, history_of(0.8)),
        ("a/variants/c", {"wandb": "offline"}, history_of(0.1)),
        ("new", {}, []),
    ):
        state = {"config": {**config, **changes}, "history": history}
        helpers.save_checkpoint(tmp_path / name / "checkpoint.pt", state)
    helpers.save_checkpoint(
        tmp_path / "old" / "checkpoint.pt",  # before there were warps
        {"config": {"Name": "old", "epochs": 3, "dropout": 0.2}, "history": history_of(0.3, 0.9)},
    )
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "checkpoint.pt").write_bytes(b"PK")
    runs = helpers.read_runs(tmp_path)
    assert set(runs) == {"a", "b", "a/variants/c", "new", "old"}
    assert "broken/checkpoint.pt: damaged" in capsys.readouterr().out
    table = helpers.compare_runs(runs)
    assert list(table.index) == ["old", "b", "a", "a/variants/c"]
    assert list(table.columns) == ["val_acc", "train_acc", "in epoch", "epochs", "dropout", "warp"]
    assert table.loc["a"].tolist() == [0.7, 0.35, 2, "3 of 3", 0.2, 0.2]
    assert table.loc["b", "epochs"] == "1 of 3" and table.loc["b", "dropout"] == 0.1
    assert pd.isna(table.loc["old", "warp"])


def test_no_runs_no_table(tmp_path):
    assert helpers.read_runs(tmp_path) == {} and len(helpers.compare_runs({})) == 0


@pytest.mark.slow
def test_the_notebook_shows_all_runs(trained, capsys):
    session = Session(trained[0])
    session.namespace |= {name: value for name, value in new_session(trained[0]).namespace.items()}
    shown = []
    session.namespace["show_runs"] = shown.append
    session.run("runs = helpers.read_runs()")
    assert [*shown[0]] == ["24", "pencil"]


# ---- What may be switched on after the training --------------------------------------------------


@pytest.mark.slow
def test_the_submission_does_as_the_config_says_now(trained, corpus, tmp_path, capsys, monkeypatch):
    runs = shutil.copytree(trained[0], tmp_path / "runs")
    session = Session(runs, corpus, QUICK)
    session.run_all(until=SUBMISSION)
    session["config"]["smoothing"] = True
    capsys.readouterr()
    session.run(SUBMISSION)
    assert "the labels are by Viterbi" in capsys.readouterr().out
    run, data = session["run"], session["test_data"]
    log_posteriors = session.call("log_probabilities", run, session["test_loader"])
    expected = session["results"].decoder(log_posteriors, data.offsets)
    assert np.array_equal(session["predictions"], PHONEMES[expected])
    submitted = []
    monkeypatch.setattr(helpers, "submit", lambda *arguments: submitted.append(arguments))
    run.data_folder = tmp_path  # without the answers
    session["config"].update(kaggle_submit=True, competition="another")
    session.run("if answers.exists():")
    assert submitted == [(runs / "pencil" / "submission.csv", "pencil", "another")]


@pytest.mark.slow
def test_the_accuracies_are_those_of_all_frames(trained):
    _, session = trained
    results = session["results"]
    assert results.accuracy["frame alone"] == pytest.approx(results.best["val_acc"])
    assert results.accuracy["Viterbi"] == (results.decoded == results.truth).mean()
    assert len(results.decoded) == len(session["val_data"])
