"""A notebook is edited and run again: cells twice, out of order, interrupted, reconfigured."""

import re
import warnings
from unittest import mock

import numpy as np
import pytest
import torch
from support import kills
from support.configs import TINY, UNPLANNED
from support.notebook import LAST, RESULTS, SUBMISSION, TRAINING, Session, code_cells, definitions

import helpers
from helpers import RunError


@pytest.fixture
def session(corpus, tmp_path):
    """All cells before the training cell have been run."""
    session = Session(tmp_path, corpus, UNPLANNED)
    session.run_all(until=TRAINING)
    session.run("def evaluate_best")
    return session


def weights(session, file="checkpoint.pt"):
    return kills.frozen(helpers.load_checkpoint(session["run"].folder / file)["model"])


# ---- The config is edited ------------------------------------------------------------------------


@pytest.mark.slow
def test_the_training_cell_alone_trains_what_the_config_says_now(session, corpus, tmp_path):
    session.run(TRAINING)
    changes = {"Name": "b", "learning_rate": 0.02, "archetype": "diamond", "context": 9}
    numbers = {
        "learning_rate": np.float64(0.02),
        "context": np.int64(9),
        "batch_norm": np.bool_(True),
    }
    session["config"].update({**changes, **numbers})
    session.run(TRAINING)
    afresh = Session(tmp_path / "afresh", corpus, {**UNPLANNED, **changes})
    afresh.run_all(until="def evaluate_best")
    assert "b: a new run\n" in session["run"].message
    assert weights(session) == weights(afresh)
    assert (
        helpers.load_checkpoint(session["run"].folder / "checkpoint.pt")["config"]
        == afresh["run"].config
    )
    names = (
        "model",
        "optimizer",
        "scheduler",
        "scaler",
        "train_loader",
        "val_loader",
        "test_loader",
    )
    assert all(session[name] is getattr(session["run"], name) for name in names)
    assert (
        session["train_data"].context == 9
        and session["train_data"] is session["train_loader"].dataset
    )
    session.run(TRAINING)  # numpy's numbers are those of the checkpoint
    assert "nothing left to train" in session["run"].message


def test_recipe_original_switches_the_additions_off_and_the_config_stays_as_it_was_written(
    corpus, tmp_path
):
    session = Session(tmp_path, corpus, {**TINY, "recipe": "original"})
    session.run_all(until="def load_data")
    off = {"warp": 0, "dropout_scale": 1, "lr_scale": 1, "test_warps": 1}
    original, _ = session.call("make_run_config", session["config"])
    assert helpers.ORIGINAL == off and off.items() <= original.items()
    assert session["config"]["warp"] == 0.2 and all(
        session["config"][key] != value for key, value in off.items()
    )
    session["config"]["recipe"] = "best"
    assert session.call("make_run_config", session["config"])[0] == {**session["config"]}


def test_a_practice_run_is_shortened_only_where_the_config_has_the_defaults(tmp_path):
    session = Session(tmp_path, changes={"epochs": 150, "batch_size": 2048})
    session.run_all(until="def load_data")
    (tmp_path / "cache" / "practice-corpus").mkdir(parents=True)
    short = {"epochs": 3, "batch_size": 512}
    for changes, expected in (
        ({}, short),
        ({"shorten": False}, {}),
        ({"epochs": 4}, {"batch_size": 512}),
    ):
        config = {**session["config"], "data": "practice", **changes}
        assert session.call("make_run_config", config)[0] == {**config, **expected}


@pytest.mark.slow
def test_the_old_runs_folder_is_free_when_another_one_has_begun(session):
    session.run(TRAINING)
    old = session["run"].folder
    session["config"].update(Name="b")
    session.run(TRAINING)
    assert kills.in_child(helpers.lock_run, old) == 0  # another process may take it
    assert kills.in_child(helpers.lock_run, session["run"].folder) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["exp 1 (lr=0.001), Jürgen's " + "x" * 130, "ü" * 100])
def test_a_name_that_passes_the_check_works_to_the_end(corpus, tmp_path, name):
    session = Session(
        tmp_path, corpus, {**UNPLANNED, "epochs": 1, "Name": name}, wandb_mode="offline"
    )
    session.run_all()
    assert (tmp_path / name / "submission.csv").exists() and list(
        (tmp_path / name / "wandb").glob("offline-run-*")
    )


@pytest.mark.slow
def test_a_trial_of_a_sweep_with_many_keys_gets_a_name(session):
    session.run("variants = [", "def run_variant")
    keys = (
        "activations",
        "batch_norm",
        "batchnorm_alternate",
        "dropout",
        "dropout_alternate",
        "weight_decay",
        "augmentations",
        "freq_mask_param",
        "time_mask_param",
        "weight_initialization",
    )
    changes = {
        **{key: session["config"][key] for key in keys},
        **UNPLANNED,
        "subset": 0.5,
        "epochs": 1,
    }
    config, history = session.call("run_variant", changes)
    assert (
        len(history) == 1
        and config["Name"] == helpers.variant_name(changes)
        and config["epochs"] == 1
    )


@pytest.mark.slow
@pytest.mark.parametrize("epochs", [1, 3])
def test_epochs_may_be_lowered_and_raised_after_the_end(session, capsys, epochs):
    session.run(TRAINING, RESULTS, SUBMISSION, LAST)
    session["config"]["epochs"] = epochs
    capsys.readouterr()
    session.run(TRAINING, RESULTS, SUBMISSION, LAST)
    printed, done = capsys.readouterr().out, max(2, epochs)
    assert [row["epoch"] for row in session["history"]] == list(range(1, done + 1))
    lines = re.findall(r"^epoch +(\d+)/(\d+) ", printed, re.M)
    assert all(int(epoch) <= int(epochs) for epoch, epochs in lines) and lines[-1] == (
        str(done),
        str(done),
    )
    assert "finished" in printed and ("nothing left to train" in printed) == (epochs == 1)


@pytest.mark.slow
def test_what_the_user_must_know_is_still_there_when_the_figure_is_drawn(
    session, monkeypatch, capsys
):
    """The figure replaces what the cell has printed before."""
    printed = []
    session.namespace["clear_output"] = lambda wait: printed.append(capsys.readouterr().out)
    monkeypatch.setattr(
        helpers,
        "open_drive",
        lambda run, place: helpers.tell(run, "fetched from Drive") or run.folder,
    )
    monkeypatch.setattr(
        helpers, "copy_to_drive", lambda *arguments, **options: print("Drive is full")
    )
    monkeypatch.setattr(
        helpers, "session_warning", lambda drive, practice: "nothing outlives the session"
    )
    session["config"]["drive"] = True
    session.environment["WANDB_MODE"] = "of"
    session["config"]["wandb"] = "disabled"
    session.run(TRAINING)
    printed.append(capsys.readouterr().out)
    assert len(printed) == 1 + session["config"]["epochs"]
    for text in printed[1:]:
        for told in (
            "fetched from Drive",
            "a new run",
            "WANDB_MODE=of is ignored",
            "nothing outlives the session",
        ):
            assert text.count(told) == 1
        assert text.endswith("Drive is full\n")


# ---- Cells twice, and out of order ---------------------------------------------------------------


@pytest.mark.slow
def test_every_cell_may_be_run_twice(corpus, tmp_path):
    twice, once = (
        Session(tmp_path / name, corpus, UNPLANNED, "offline") for name in ("twice", "once")
    )
    once.run_all()
    twice.run_all(until="def options")
    for source in code_cells()[
        code_cells().index(next(s for s in code_cells() if "def options" in s)) :
    ]:
        twice.execute(source, source)
    assert weights(twice) == weights(once)
    csvs = [
        (tmp_path / name / "pencil" / "submission.csv").read_bytes() for name in ("twice", "once")
    ]
    assert csvs[0] == csvs[1]


def test_a_cell_that_needs_what_is_not_there_says_what_to_run_first(corpus, tmp_path):
    """Each cell directly after the functions, as after "run selected cell" in a new kernel."""
    told = {}
    for source in code_cells():
        if "need(" not in source or "def need" in source:
            continue
        session = Session(tmp_path, corpus)
        session.namespace |= definitions()
        with pytest.raises(RunError, match=r"is not there, .*: run section \d+\. \w+.* first"):
            session.execute(source)
        told[source] = True
    bodies = r"#[^\n]*|(def|class) \w+\(.*?(?=\n\S|\Z)"
    names = r"\b(results|run|train_data|run_config|train_loader|submission)\b"
    uses = [
        source
        for source in code_cells()
        if re.search(names, re.sub(bodies, "", source, flags=re.S))
    ]
    makes = (
        "run = make_run",
        "run_config, data_folder =",
        "LOSSES = {",
        "MADE_IN",
        "import platform",
        "config = {",
        "config = helpers.check_config(",
    )
    missing = [
        source
        for source in uses
        if source not in told and not any(text in source for text in makes)
    ]
    assert len(told) > 8 and not missing, missing


@pytest.mark.slow
def test_results_before_the_first_epoch_has_ended(session):
    session.namespace["run_epoch"] = mock.Mock(side_effect=KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        session.run(TRAINING)
    with pytest.raises(RunError, match="no epoch has ended yet: run the training cell"):
        session.run(RESULTS)


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe, ways",
    [
        ("original", ["frame alone", "Viterbi"]),
        ("best", ["frame alone", "mean over warps", "Viterbi"]),
    ],
)
def test_results_speak_of_a_mean_over_warps_only_where_there_is_one(session, recipe, ways):
    session["config"].update(recipe=recipe, epochs=1)
    session.run(TRAINING, RESULTS)
    assert list(session["results"].accuracy) == ways
    assert np.array_equal(session["results"].alone, session["results"].predicted) == (
        recipe == "original"
    )


@pytest.mark.slow
def test_results_of_an_earlier_run_are_not_taken_for_this_ones(session):
    session.run(TRAINING, RESULTS)
    session["config"]["Name"] = "b"
    session.run(TRAINING)
    for cell in (SUBMISSION, "helpers.plot_phonemes(results", LAST):
        with pytest.raises(
            RunError, match="`results` is not there, or belongs to an earlier run: run section 8"
        ):
            session.run(cell)
    session.run(RESULTS)
    with pytest.raises(
        RunError, match="`submission` is not there, or belongs to an earlier run: run section 9"
    ):
        session.run(LAST)
    session.run(SUBMISSION)
    assert (session["run"].folder / "submission.csv").exists()


# ---- Interrupts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("again", ["the cell", pytest.param("fit alone", marks=pytest.mark.slow)])
def test_an_interrupted_training_run_again_ends_with_the_same_weights(
    session, corpus, tmp_path, again
):
    count, step = [0], torch.optim.AdamW.step

    def stop_in_the_second_epoch(*arguments, **options):
        count[0] += 1
        if count[0] == len(session["train_loader"]) + 2:
            raise KeyboardInterrupt
        return step(*arguments, **options)

    with (
        mock.patch.object(torch.optim.AdamW, "step", stop_in_the_second_epoch),
        pytest.raises(KeyboardInterrupt),
    ):
        session.run(TRAINING)
    assert len(helpers.load_checkpoint(session["run"].folder / "checkpoint.pt")["history"]) == 1
    session.run(RESULTS, SUBMISSION)  # with the epoch that is there
    if again == "the cell":
        session.run(TRAINING)
        assert "1 of 2 epochs are done, resuming" in session["run"].message
    else:
        session.call(
            "fit", session["run"]
        )  # its network and optimizer are as the interrupt has left them
    whole = Session(tmp_path / "whole", corpus, UNPLANNED)
    whole.run_all(until="def evaluate_best")
    assert weights(session) == weights(whole) and weights(session, "best.pt") == weights(
        whole, "best.pt"
    )


@pytest.mark.slow
def test_the_chosen_precision_is_kept_in_the_checkpoint(session, monkeypatch):
    for epochs, fastest in ((1, "bfloat16"), (2, "float32")):
        monkeypatch.setattr(
            helpers,
            "pick_precision",
            lambda device, saved=None, fastest=fastest: getattr(torch, saved or fastest),
        )
        session["config"]["epochs"] = epochs
        session.run(TRAINING)
    assert session["run"].precision == torch.bfloat16


# ---- Precision and optimizers --------------------------------------------------------------------


@pytest.mark.parametrize("instructions", ["avx512_bf16", "amx_bf16"])
def test_a_cpu_computes_in_bfloat16_if_it_has_instructions_for_it(monkeypatch, instructions):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {instructions: True}, raising=False)
    assert helpers.pick_precision("cpu") == torch.bfloat16
    assert helpers.pick_precision("cpu", "float32") == torch.float32
    assert helpers.pick_precision("cpu", "float16") == torch.bfloat16  # of a GPU's checkpoint
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {instructions: False}, raising=False)
    assert helpers.pick_precision("cpu", "bfloat16") == torch.float32  # it would be emulated
    assert helpers.pick_precision("mps") == torch.float32


@pytest.mark.parametrize("native", [True, False])
def test_on_a_gpu_without_native_bfloat16_the_precision_is_float16(monkeypatch, native):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    assert helpers.pick_precision("cuda") == (torch.bfloat16 if native else torch.float16)
    assert helpers.pick_precision("cuda", "float16") == torch.float16
    assert helpers.pick_precision("cuda", "bfloat16") == (
        torch.bfloat16 if native else torch.float16
    )


def test_a_gpu_that_this_torch_cannot_use_is_named_with_what_to_choose(monkeypatch):
    error = RuntimeError(
        "CUDA error: no kernel image is available for execution on the device\nmore"
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla P100-PCIE-16GB")
    monkeypatch.setattr(torch, "ones", mock.Mock(side_effect=error))
    with pytest.raises(
        RunError, match="Tesla P100-PCIE-16GB .*no kernel image.*Settings > Accelerator > GPU T4 x2"
    ):
        helpers.pick_device()


SMALL = {
    "subset": 0.3,
    "context": 0,
    "batch_size": 128,
    "epochs": 1,
}  # a CPU that emulates float16 is slow


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["sgd", "nesterov", "adam", "adamw", "rmsprop"])
def test_a_first_step_that_overflows_in_float16_is_skipped_and_the_run_learns(session, optimizer):
    """torch's fused SGD would go on from a momentum that was never written."""
    rate = 0.01 if optimizer in ("sgd", "nesterov") else 0.001
    session["config"].update(
        SMALL,
        optimizers=optimizer,
        archetype="diamond",
        batch_norm=False,
        learning_rate=rate,
        weight_initialization="kaiming_normal",
    )
    run = session.call("make_run", session["config"])
    run.precision = torch.float16
    run.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-26)
    row = session.call("run_epoch", run, 1)
    assert all(tensor.isfinite().all() for tensor in run.model.state_dict().values())
    assert np.isfinite(row["train_loss"]) and run.scaler.get_scale() < 2.0**40


@pytest.mark.slow
def test_an_epoch_whose_steps_were_all_skipped_warns_of_nothing(session):
    session["config"].update(SMALL, optimizers="rmsprop")
    run = session.call("make_run", session["config"])
    run.precision = torch.float16
    run.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120, backoff_factor=0.99)
    before = {name: tensor.clone() for name, tensor in run.model.named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        session.call("run_epoch", run, 1)
    assert all(tensor.equal(before[name]) for name, tensor in run.model.named_parameters())
