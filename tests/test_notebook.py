"""The notebook executed whole, in a kernel of its own, on a tiny practice corpus."""

import json
import os
import re
import shutil

import nbformat
import pandas as pd
import pytest
from support.configs import TINY
from support.notebook import NOTEBOOK, ROOT, Session, execute
from support.wandb_runs import wandb_records, wandb_values

import helpers

CHANGES = {**TINY, "epochs": 3, "learning_rate": 0.003}


@pytest.fixture(scope="module")
def runs(corpus, tmp_path_factory):
    """A runs folder that has the tiny corpus in the place of the practice corpus."""
    runs = tmp_path_factory.mktemp("runs")
    shutil.copytree(corpus, runs / "cache" / "practice-corpus")
    return runs


@pytest.fixture(scope="module")
def executed(runs):
    return execute(CHANGES, runs)


def outputs(notebook, kind=None):
    return [
        output
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if kind is None or output.output_type == kind
    ]


def text(notebook):
    return "".join(output.text for output in outputs(notebook, "stream"))


@pytest.mark.slow
def test_it_runs_to_a_checked_and_scored_csv(executed, runs, corpus):
    assert "PRACTICE CORPUS" in text(executed)
    rows = pd.read_csv(runs / "pencil" / "submission.csv")
    answers = pd.read_csv(corpus / "answers.csv")
    assert list(rows) == ["id", "label"] and list(rows["id"]) == list(range(len(answers)))
    accuracy = (rows["label"] == answers["label"]).mean()
    assert f"{accuracy:.2%} of the test frames right" in text(executed)
    assert (
        accuracy > 1.5 * answers["label"].value_counts(normalize=True).max()
    )  # it has learned something


@pytest.mark.slow
def test_it_leaves_one_line_an_epoch_one_figure_and_no_trail_of_a_bar(executed):
    assert [int(n) for n in re.findall(r"^epoch +(\d+)/3 \| train", text(executed), re.M)] == [
        1,
        2,
        3,
    ]
    assert not [output for output in outputs(executed) if "widget" in json.dumps(output)]
    assert not [output for output in outputs(executed, "stream") if output.name == "stderr"]
    [training] = [
        cell for cell in executed.cells if cell.source.startswith("run = make_run(config)")
    ]
    assert sum("image/png" in output.get("data", {}) for output in training.outputs) == 1
    assert len(nbformat.writes(executed)) < 1e6


@pytest.mark.slow
def test_the_checkpoint_has_the_code_of_the_cells_and_of_helpers(executed, runs):
    for file in ("checkpoint.pt", "best.pt"):
        code = helpers.load_checkpoint(runs / "pencil" / file)["code"]
        assert (
            code["train"].startswith("def train(run):") and "self.model(" in code["Network.forward"]
        )
        assert code["_mfccs"].startswith("def _mfccs(") and "LeakyReLU" in code["layer model.2"]


@pytest.mark.slow
def test_offline_wandb_has_every_metric_of_every_epoch(executed, runs):
    rows, summary, config = [], {}, {}
    for record in wandb_records(runs / "pencil"):
        row = wandb_values(record.history.item)  # a record of another kind has no items here
        rows += [row] if "epoch" in row else []
        summary |= wandb_values(record.summary.update)
        config |= wandb_values(record.run.config.update)
    assert [row["epoch"] for row in rows] == [
        1,
        2,
        3,
    ]  # each once: what is logged at the end has no epoch
    printed = re.findall(
        r"train +([\d.]+)% loss ([\d.]+) \| val +([\d.]+)% loss ([\d.]+) \| lr ([\d.]+)",
        text(executed),
    )
    for row, numbers in zip(rows, printed, strict=True):
        assert row["train_acc"] * 100 == pytest.approx(float(numbers[0]), abs=0.01)
        assert row["train_loss"] == pytest.approx(float(numbers[1]), abs=1e-4)
        assert row["val_acc"] * 100 == pytest.approx(float(numbers[2]), abs=0.01)
        assert row["val_loss"] == pytest.approx(float(numbers[3]), abs=1e-4)
        assert row["learning_rate"] == pytest.approx(float(numbers[4]), abs=1e-7)
        assert row["seconds"] > 0 and row["frames_per_second"] > 0
    assert summary["best_val_acc"] == max(row["val_acc"] for row in rows)
    assert {key: config[key] for key in CHANGES} == CHANGES and config["device"] and config["torch"]


@pytest.mark.slow
def test_again_it_trains_nothing_and_gives_the_same(executed, runs):
    before = (runs / "pencil" / "submission.csv").read_bytes()
    again = execute(CHANGES, runs)
    assert "nothing left to train" in text(again)
    assert re.findall("^epoch.*", text(again), re.M) == re.findall("^epoch.*", text(executed), re.M)
    assert (runs / "pencil" / "submission.csv").read_bytes() == before


def test_the_committed_notebook_is_one_honest_run():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not outputs(notebook, "error")
    assert NOTEBOOK.stat().st_size < 1e6
    assert max(len(cell.source.splitlines()) for cell in cells) <= 30


@pytest.mark.slow
def test_figures_appear_and_nothing_is_red_whatever_the_environment_says():
    """matplotlib's backend in the environment, as on many servers; ipywidgets missing."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    stop = (
        next(
            i for i, cell in enumerate(notebook.cells) if "import matplotlib.pyplot" in cell.source
        )
        + 1
    )
    sources = ["import sys\nsys.modules['ipywidgets'] = None", "plt.plot([1, 2])\nplt.show()"]
    first, last = map(nbformat.v4.new_code_cell, sources)
    notebook.cells = [first, *notebook.cells[:stop], last]
    from nbclient import NotebookClient  # here, because it takes seconds

    client = NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}
    )
    client.execute(env={**os.environ, "MPLBACKEND": "agg"})
    assert "image/png" in last.outputs[-1].get("data", {})
    assert not [output for output in outputs(notebook, "stream") if output.name == "stderr"]


@pytest.mark.slow
def test_variants_are_trained_once_compared_and_a_failed_one_is_noted(corpus, tmp_path, capsys):
    session = Session(tmp_path, corpus, {**TINY, "ablations": True})
    session.run_all(until="trained, failures, ")
    session.namespace["base"] = {"epochs": 1}
    session.namespace["variants"] = [
        {"activations": "gelu"},
        {"activations": "tanh", "num_layers": 3},
        {"activations": "sine"},
    ]
    trained, train = [], session["train"]
    session.namespace["train"] = lambda run: trained.append(run.config["Name"]) or train(run)
    for _ in range(2):  # the second time everything is there
        session.run("trained, failures, ", 'need("trained"')
    assert trained == ["activations=gelu", "activations=tanh,num_layers=3"]
    table = pd.read_csv(tmp_path / "pencil" / "variants.csv")
    assert list(table["val_acc"]) == sorted(table["val_acc"], reverse=True) and set(
        table["num_layers"]
    ) == {2, 3}
    assert "sine" in capsys.readouterr().out
