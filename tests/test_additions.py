"""Parts of one's own: the README's additions, and what else people put into the tables."""

import contextlib
import functools
import io
import re
from functools import partial
from unittest import mock

import numpy as np
import pytest
import torch
from support import kills
from support.configs import QUICK, TINY
from support.notebook import (
    RESULTS,
    ROOT,
    SUBMISSION,
    TRAINING,
    Session,
    code_cells,
    notebook_text,
    python_blocks,
)
from support.reference import cut_corpus
from support.wandb_runs import finished_records, wandb_values
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import ConcatDataset, DataLoader, Subset, WeightedRandomSampler

import helpers
from helpers import DataError, RunError

FEW_FRAMES = {**TINY, "batch_size": 128}  # of the corpus `small`
SECTION = (ROOT / "README.md").read_text("utf-8").split("## Change something")[1].split("\n## ")[0]
BLOCKS = {
    re.search(r'config\.update\(Name="(.*?)"', block)[1]: block for block in python_blocks(SECTION)
}
[FOLD] = [block for block in python_blocks(notebook_text()) if "fold-0" in block]
[TRIAL] = [block for block in python_blocks(notebook_text()) if "def trial" in block]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A corpus with two utterances for training: the networks here are large."""
    root = tmp_path_factory.mktemp("small")
    helpers.make_practice_corpus(root / "whole", (2, 1, 1))
    return cut_corpus(root / "whole", root / "corpus", frames=300)


@pytest.fixture
def session(corpus, tmp_path):
    """All cells before the training cell have been run."""
    session = Session(tmp_path, corpus, QUICK)
    session.run_all(until=TRAINING)
    session.run("def evaluate_best")
    return session


# ---- The README's additions ----------------------------------------------------------------------


def run_with(block, runs, data, stop_at_step=None):
    """The whole notebook with a block of the README in a cell below its table.

    stop_at_step: the step of the optimizer at which the user interrupts.
    """
    session, count, step = Session(runs, data, FEW_FRAMES), [0], torch.optim.AdamW.step
    cells = code_cells(FEW_FRAMES)
    [table] = re.findall(r"^([A-Z]+)\[", block, re.M)
    [place] = [i + 1 for i, source in enumerate(cells) if re.search(rf"^{table} = ", source, re.M)]

    def stop(*arguments, **options):
        count[0] += 1
        if count[0] == stop_at_step:
            raise KeyboardInterrupt
        return step(*arguments, **options)

    with mock.patch.object(torch.optim.AdamW, "step", stop):
        session.execute(*cells[:place], block, *cells[place:])
    return session


@pytest.fixture(scope="module")
def whole_run(small, tmp_path_factory):
    """A function of an addition's name: (a session with it that was never stopped, its output)."""
    runs = tmp_path_factory.mktemp("whole")

    @functools.cache
    def run(name):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            session = run_with(BLOCKS[name], runs, small)
        return session, printed.getvalue()

    return run


def test_there_are_four_additions():
    assert [*BLOCKS] == ["one cycle", "weighted", "noise", "residual"]
    assert all(len(block.splitlines()) <= 14 for block in BLOCKS.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", BLOCKS)
def test_an_addition_runs_to_the_csv_and_resumed_ends_with_the_same_bits(
    whole_run, small, tmp_path, name
):
    whole, _ = whole_run(name)
    runs = whole["run"].folder.parent
    steps = len(whole["train_loader"])
    assert len(whole["history"]) == 2 and whole["run"].config["Name"] == name
    labels = helpers.read_submission(runs / name / "submission.csv", len(whole["test_data"]))
    assert list(labels) == list(whole["predictions"])
    with pytest.raises(KeyboardInterrupt):
        run_with(BLOCKS[name], tmp_path, small, stop_at_step=steps + steps // 2)
    again = run_with(BLOCKS[name], tmp_path, small)  # in a new kernel
    assert "1 of 2 epochs are done, resuming" in again["run"].message
    assert kills.outcome(tmp_path, name) == kills.outcome(runs, name)


@pytest.mark.slow
def test_one_cycle_is_stepped_after_each_batch(whole_run):
    session, _ = whole_run("one cycle")
    run = session["run"]
    steps, peak = len(run.train_loader), 0.001 * 2 * (1600 / 512) ** 0.5
    assert run.scheduler.last_epoch == 2 * steps
    first, second = (row["learning_rate"] for row in run.history)
    assert first == pytest.approx(peak / 25) and peak / 25 < second < peak


@pytest.mark.slow
def test_the_residual_networks_rates_are_scaled_by_its_width(whole_run):
    session, printed = whole_run("residual")
    run = session["run"]
    assert run.history[0]["learning_rate"] == pytest.approx(0.001 * 2 * (1600 / 1024) ** 0.5)
    rates = [layer.p for layer in run.model.modules() if isinstance(layer, nn.Dropout)]
    assert rates == pytest.approx([2 * 0.2 * 1024 / 1600] * 6)
    assert "6 dropout layers x 0.10 in the first epoch, x 2.00 in the last" in printed


@pytest.mark.slow
def test_an_addition_may_come_when_the_notebook_has_run(session):
    session.run(TRAINING)
    session.execute(BLOCKS["noise"], BLOCKS["weighted"])
    session.run(TRAINING, RESULTS)
    assert (
        session["run"].config["loss"] == "weighted"
        and session["run"].config["augmentations"] == "noise"
    )
    assert (
        session["criterion"] is session["run"].criterion and session["criterion"].weight is not None
    )


@pytest.mark.slow
def test_a_fold_of_links_is_trained_on(session, corpus):
    for _ in range(2):  # the cell may be run twice
        session.execute(FOLD)
    session.environment["HW1P2_DATA"] = str(session["fold"])  # what the cell has set
    session.run(TRAINING, RESULTS, SUBMISSION)
    names = {
        name: sorted(path.name for path in (session["fold"] / name / "mfcc").iterdir())
        for name in helpers.PARTITIONS
    }
    assert names["dev-clean"] == [f"{i:06d}.npy" for i in range(0, 24, 5)]
    assert len(names["train-clean-100"]) == 24 - 5 and len(names["test-clean"]) == 3
    train = session["train_data"]
    assert torch.equal(train.utterance(0)[0], helpers.AudioDataset(corpus).utterance(1)[0])


def test_a_typing_error_is_refused_before_the_training(corpus, tmp_path):
    for key in ("archetype", "loss", "optimizers", "scheduler", "augmentations", "activations"):
        session = Session(tmp_path, corpus, {**TINY, key: "nonsense"})
        with pytest.raises(ValueError, match=f"'{key}' is 'nonsense'; allowed: "):
            session.run_all()
        assert "make_run" not in session.namespace
    for key in ("lr", "recipe", "epochs"):  # not the name of a part: before anything is loaded
        session = Session(tmp_path, corpus, {**TINY, key: "nonsense"})
        with pytest.raises(ValueError, match=key):
            session.run_all()
        assert "load_data" not in session.namespace


# ---- Losses --------------------------------------------------------------------------------------


def weighted(train_data, **options):
    weight = torch.linspace(0.1, 5, 42)
    return nn.CrossEntropyLoss(weight=weight, **options)


class Focal(nn.CrossEntropyLoss):
    """Its mean is over the frames, though its class has weights (Lin et al., 2017)."""

    def __init__(self):
        super().__init__(weight=torch.linspace(0.1, 5, 42))

    def forward(self, logits, phonemes):
        likely = logits.softmax(1).gather(1, phonemes[:, None])[:, 0]
        loss = nn.functional.cross_entropy(logits, phonemes, self.weight, reduction="none")
        return ((1 - likely) ** 2 * loss).mean()


LOSSES = {
    "weighted": weighted,
    "weighted and smoothed": partial(weighted, label_smoothing=0.2),
    "without silence": partial(weighted, ignore_index=0),
    "plain": lambda data: nn.CrossEntropyLoss(),
    "margin": lambda data: nn.MultiMarginLoss(weight=torch.linspace(0.1, 5, 42)),
    "without silence, unweighted": lambda data: nn.CrossEntropyLoss(ignore_index=0),
    "focal": lambda data: Focal(),
    "a function": lambda data: nn.functional.cross_entropy,
}


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in [*LOSSES][1:-1]]


@pytest.mark.parametrize("name", ["weighted", *SLOW, "a function"])
def test_the_loss_of_a_data_set_does_not_depend_on_the_batch_size(session, name):
    session["LOSSES"]["mine"] = LOSSES[name]
    run = session.call(
        "make_run",
        session["config"],
        {
            "loss": "mine",
            "learning_rate": 0,
            "warp": 0,
            "augmentations": None,
            "dropout": 0,
            "batch_norm": False,
        },
    )
    data = run.val_loader.dataset
    with torch.no_grad():
        frames, phonemes = data[torch.arange(len(data))]
        expected = run.criterion(run.model.eval()(frames), phonemes).item()  # as one batch
    for size in (300, 7777):
        loss, _ = session.call("eval", run, helpers.make_loader(data, size))
        assert loss == pytest.approx(expected, rel=1e-5)
        run.train_loader = helpers.make_loader(data, size, shuffle=True)
        assert session.call("train", run)[0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_labelsmoothing_is_torchs(session):
    run = session.call("make_run", session["config"], {"loss": "labelsmoothing"})
    logits, phonemes = torch.randn(50, 42), torch.randint(40, (50,))
    assert run.criterion(logits, phonemes) == nn.CrossEntropyLoss(label_smoothing=0.1)(
        logits, phonemes
    )


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_loss_that_is_no_mean_is_refused(session, reduction):
    session["LOSSES"]["mine"] = lambda data: nn.CrossEntropyLoss(reduction=reduction)
    with pytest.raises(
        RunError, match=f"LOSSES\\['mine'\\] has the reduction '{reduction}'; expected the mean"
    ):
        session.call("make_run", session["config"], {"loss": "mine"})


# ---- Schedules -----------------------------------------------------------------------------------


def fit_with(session, make, **changes):
    """Train with a schedule of one's own; `changes` are of its entry, or "epochs"."""
    epochs = changes.pop("epochs", 2)
    session["SCHEDULERS"]["mine"] = session["Schedule"](make, **changes)
    session["config"].update(scheduler="mine", epochs=epochs, dropout_scale=1)
    session.run(TRAINING)
    return session["run"]


@pytest.mark.slow
def test_a_second_reducelronplateau_gets_the_loss(session):
    run = fit_with(
        session,
        lambda optimizer, *_: lr_scheduler.ReduceLROnPlateau(optimizer, threshold=1e9, patience=0),
        step="val_loss",
        epochs=3,
    )
    assert [row["learning_rate"] for row in run.history] == pytest.approx(
        run.history[0]["learning_rate"] * np.array([1, 0.1, 0.01])
    )


@pytest.mark.slow
def test_a_schedule_of_ones_own_is_planned_or_not_as_its_entry_says(session):
    def make(optimizer, *_):
        return lr_scheduler.StepLR(optimizer, 1)

    fit_with(session, make, planned=False)
    assert len(fit_with(session, make, planned=False, epochs=3).history) == 3
    session["config"]["Name"] = "planned"
    fit_with(session, make)
    with pytest.raises(RunError, match="epochs: 2 there.*, 3 now"):
        fit_with(session, make, epochs=3)


def one_cycle(optimizer, epochs, steps):
    return lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, epochs=epochs, steps_per_epoch=steps)


@pytest.mark.slow
@pytest.mark.parametrize(
    "make, step, text",
    [
        (
            lambda optimizer, *_: lr_scheduler.StepLR(optimizer, 1),
            "batches",
            "step='batches': expected 'epoch', 'batch'",
        ),
        (
            lambda optimizer, *_: lr_scheduler.ReduceLROnPlateau(optimizer),
            "epoch",
            "needs to know the loss.*'val_loss'",
        ),
        (
            one_cycle,
            "epoch",
            r"OneCycleLR is made for \d+ steps, but with step='epoch' it is stepped 2 times",
        ),
        (
            lambda optimizer, epochs, _: one_cycle(optimizer, epochs, 1),
            "batch",
            "made for 2 steps, .* stepped .* times",
        ),
    ],
)
def test_a_schedule_that_would_be_stepped_wrongly_is_refused_before_the_training(
    session, make, step, text
):
    with pytest.raises(RunError, match=text):
        fit_with(session, make, step=step)
    assert not (
        session["run"].folder if "run" in session.namespace else helpers.Path("none")
    ).exists()


# ---- Networks ------------------------------------------------------------------------------------


class Plain(nn.Module):
    """The way most people write it: one dropout layer for all, defined last."""

    def __init__(self, input_size, output_size, config):
        super().__init__()
        self.first, self.second = nn.Linear(input_size, 320), nn.Linear(320, output_size)
        self.dropout = nn.Dropout(0.25)

    def forward(self, frames):
        return self.second(self.dropout(self.first(frames.flatten(1)).relu()))


def linear(input_size, output_size, config):
    return nn.Sequential(nn.Flatten(), nn.Dropout(0.25), nn.Linear(input_size, output_size))


def without_linear(input_size, output_size, config):
    return nn.Sequential(
        nn.Conv1d(
            2 * config["context"] + 1, output_size, input_size // (2 * config["context"] + 1)
        ),
        nn.Flatten(),
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "make, width, factor", [(Plain, 320, 2 * 5**0.5), (linear, 1600, 1), (without_linear, None, 1)]
)
def test_rates_of_a_network_of_ones_own(session, make, width, factor):
    session["NETWORKS"]["mine"] = make
    session["config"]["archetype"] = "mine"
    session.run(TRAINING, RESULTS)
    run = session["run"]
    assert run.history[0]["learning_rate"] == pytest.approx(0.001 * factor)
    layers = [layer for layer in run.model.modules() if isinstance(layer, nn.Dropout)]
    scale = session["set_dropout"](run.model, run.config, len(session["train_data"]), 2)
    for epoch in (1, 2, 2):  # the rate that it was made with is not forgotten
        scale = session["set_dropout"](run.model, run.config, len(session["train_data"]), epoch)
        assert [layer.p for layer in layers] == pytest.approx(
            [scale * 0.25 * (width or 0) / 1600] * len(layers)
        )
    assert len(layers) == (width is not None)
    assert run.history[1]["train_loss"] < run.history[0]["train_loss"]


@pytest.mark.slow
def test_a_network_of_ones_own_computes_in_the_runs_precision(session):
    session["NETWORKS"]["mine"] = Plain
    run = session.call("make_run", session["config"], {"archetype": "mine"})
    seen = []
    run.model.first.register_forward_hook(
        lambda layer, inputs, output: seen.append((inputs[0].dtype, output.dtype))
    )
    frames, _ = next(iter(run.train_loader))
    for run.precision in (torch.float32, torch.bfloat16):
        assert session.call("forward", run, frames).dtype == torch.float32
    assert seen == [(torch.float32, torch.float32), (torch.float32, torch.bfloat16)]


@pytest.mark.slow
def test_what_a_run_cannot_be_trained_with_is_refused_in_a_sentence(session):
    run = session.call("make_run", session["config"])
    whole = run.model
    run.model = nn.DataParallel(whole)
    with pytest.raises(RunError, match="uses one GPU.*its `.module`"):
        session.call("fit", run)
    run.model = whole
    sampler = WeightedRandomSampler(torch.ones(len(session["train_data"])), 100)
    run.train_loader = DataLoader(session["train_data"], 100, sampler=sampler)
    with pytest.raises(
        RunError, match="has a WeightedRandomSampler; expected a loader of `make_loader`.*README"
    ):
        session.call("fit", run)


def test_a_subset_or_several_sets_are_refused_with_what_to_do(corpus):
    data = helpers.AudioDataset(corpus, "dev-clean")
    for other in (Subset(data, range(10)), ConcatDataset([data, data])):
        with pytest.raises(
            DataError, match=f"has got a {type(other).__name__}; .*a folder of links.*section 12"
        ):
            helpers.make_loader(other, 8)


# ---- torch.compile -------------------------------------------------------------------------------


@pytest.mark.slow
def test_compiled_dropout_keeps_the_mean_as_its_rate_changes():
    model = nn.Sequential(nn.Identity(), helpers.Dropout(0.1))
    compiled, x = torch.compile(model, backend="aot_eager"), torch.ones(500, 1000)
    compiled_by_default = torch.compile(model)
    torch.manual_seed(1)
    for rate in np.linspace(0.05, 0.45, 8):
        model[1].p = rate
        outputs = [compiled(x)]
        try:
            outputs.append(compiled_by_default(x))
        except Exception as error:  # where there is no C++ compiler
            assert "compiler" in str(error).lower()
        for y in outputs:
            assert abs((y == 0).float().mean() - rate) < 5 * (rate * (1 - rate) / x.numel()) ** 0.5
            assert y.mean() == pytest.approx(1, abs=0.01)
            assert y.max().item() == pytest.approx(1 / (1 - rate))


def compile_in_place(model):
    model.compile(backend="eager")
    return model


def compile_a_part(model):
    model.model = torch.compile(model.model, backend="eager")
    return model


COMPILED = {
    "whole": lambda model: torch.compile(model, backend="eager"),
    "in place": compile_in_place,
    "a part": compile_a_part,
    "not": lambda model: model,
}


@pytest.mark.slow
def test_a_compiled_run_opens_without_compile_and_the_other_way_round(session):
    session["config"].update(scheduler="steplr", dropout_scale=1)
    for epochs, how in enumerate(("in place", "a part", "whole", "not", "whole"), start=1):
        run = session.call("make_run", session["config"], {"epochs": epochs})
        run.model = COMPILED[how](run.model)
        history = session.call("fit", run)
        assert len(history) == epochs
        session.namespace["run"] = run
        session.run(RESULTS)
    best = helpers.load_checkpoint(run.folder / "best.pt")["model"]
    assert [name for name in best if "_orig_mod" in name] == [] and "model.0.weight" in best
    plain = session.call("make_network", run.config, session["train_data"])
    plain.load_state_dict(best)  # strictly


# ---- Seeds ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_seed_decides_weights_and_order_and_is_the_runs_own(session):
    def first_weight(changes):
        run = session.call("make_run", session["config"], changes)
        run.train_loader.sampler.set_epoch(1)
        return run.model.model[0].weight[0, 0].item(), next(iter(run.train_loader.sampler))[
            :5
        ].tolist()

    first = first_weight({})
    torch.manual_seed(99)  # has no effect
    assert first_weight({"Name": "again"}) == first
    other = first_weight({"Name": "other", "seed": 24})
    assert other[0] != first[0] and other[1] != first[1]
    with pytest.raises(RunError, match="seed: 23 there, 24 now"):
        session.call("make_run", session["config"], {"seed": 24})


def test_an_epoch_of_one_seed_is_none_of_another():
    orders = {}
    for seed in (0, 1, 2, 23, 24, 2**32 - 1):
        for epoch in range(4):
            batches = helpers.Batches(1000, 1000, shuffle=True, seed=seed)
            batches.set_epoch(epoch)
            orders[seed, epoch] = tuple(next(iter(batches)).tolist())
    assert len(set(orders.values())) == len(orders)


# ---- The exercises of the last section -----------------------------------------------------------


@pytest.mark.slow
def test_the_exercises_run(corpus, tmp_path, capsys):
    section = notebook_text().split("## 13. What next?")[1]
    variants, *others = python_blocks(section)
    session = Session(tmp_path, corpus, QUICK)
    session.run_all()
    session.execute(variants)
    session.run("trained, failures, ", 'need("trained")')
    assert len(session["trained"]) == 5 and not session["failures"]
    capsys.readouterr()
    session.execute(*others)
    printed = capsys.readouterr().out
    rates = [float(rate) for rate in re.findall(r": ([\d.]+) phones per second", printed)]
    assert len(rates) == 3 and rates[2] < rates[1]  # Viterbi has fewer phones than the network
    both, two = (float(share) for share in re.findall(r"^([\d.]+)%$", printed, re.M))
    assert two > both > 10


# ---- Variants and sweeps -------------------------------------------------------------------------


def test_what_a_variant_sets_wins_over_recipe_and_shorten(tmp_path):
    session = Session(tmp_path, changes={"recipe": "original", "data": "practice"})
    session.run_all(until="def load_data")
    (tmp_path / "cache" / "practice-corpus").mkdir(parents=True)
    original = helpers.ORIGINAL
    for changes, expected in (
        ({}, {**original, "epochs": 3, "batch_size": 512}),
        ({"warp": 0.2}, {**original, "warp": 0.2, "epochs": 3}),
        ({"lr_scale": 4, "epochs": 150}, {**original, "lr_scale": 4, "epochs": 150}),
        ({"batch_size": 2048}, {"batch_size": 2048, "epochs": 3}),
        ({"recipe": "best"}, {"warp": 0.2, "lr_scale": "auto", "epochs": 3}),
    ):
        run_config, _ = session.call("make_run_config", session["config"], changes)
        assert {key: run_config[key] for key in expected} == expected
        assert (
            session.call("make_run_config", run_config)[0] == run_config
        )  # run_config again, it stays as it is


@pytest.mark.slow
def test_variants_of_recipe_original_are_different_runs(session):
    session.run("def run_variant")
    session["config"]["recipe"] = "original"
    session.namespace["base"] = {"epochs": 1}
    configs = [
        session.call("run_variant", changes)[0] for changes in ({}, {"warp": 0.2}, {"lr_scale": 4})
    ]
    assert [(config["warp"], config["lr_scale"]) for config in configs] == [
        (0, 1),
        (0.2, 1),
        (0, 4),
    ]


@pytest.mark.slow
def test_a_trial_of_a_sweep_has_the_whole_config_its_best_accuracy_and_its_files(
    corpus, tmp_path, monkeypatch
):
    """As wandb's agent calls it: `wandb.init` gives a run whose config the sweep has set."""
    import wandb

    session = Session(tmp_path, corpus, {**TINY, "recipe": "original"}, wandb_mode="offline")
    session.run_all(until=TRAINING)
    session.run("def run_variant")
    session.execute(TRIAL)
    session.namespace["base"] = {"num_layers": 3}
    started, init = [], wandb.init

    def init_of_a_sweep(**options):
        started.append(init(**options, mode="offline", config={"warp": 0.1, "epochs": 2}))
        return started[-1]

    monkeypatch.setattr(wandb, "init", init_of_a_sweep)
    session.call("trial")
    [run] = started
    config, summary = dict(run.config), {}
    for record in finished_records(tmp_path / "pencil"):
        summary |= wandb_values(record.summary.update)
    assert config["warp"] == 0.1 and config["num_layers"] == 3 and config["learning_rate"] == 0.001
    assert set(session["config"]) <= set(config) and config["device"]
    folder = tmp_path / "pencil" / "variants" / "epochs=2,warp=0.1"
    history = helpers.load_checkpoint(folder / "checkpoint.pt")["history"]
    assert summary["best_val_acc"] == max(row["val_acc"] for row in history)
    [kept] = (tmp_path / "pencil" / "wandb").glob("offline-run-*/files/model_arch.txt")
    assert kept.read_text() == (folder / "model_arch.txt").read_text() != ""
