"""The notebook's network, optimizers, schedules and loops, against slow and plain references."""

import copy
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.configs import PLAIN
from support.notebook import definitions
from torch import nn
from torchsummaryX import summary

import helpers
from helpers import PHONEMES, RunError

BOOK = definitions()
OPTIONS = BOOK["options"]()

CONTEXT = 2
INPUT = (2 * CONTEXT + 1) * 28
DATA_28 = SimpleNamespace(coefficients=28)


@pytest.fixture
def book():
    """The notebook's functions and classes; on the CPU in float32, whatever this machine has."""
    namespace = definitions()
    namespace.update(device="cpu", show_progress=lambda *_: None)
    return SimpleNamespace(
        **{name: value for name, value in namespace.items() if name.isidentifier()},
        namespace=namespace,
    )


@pytest.fixture(scope="module")
def data(corpus):
    return {
        partition: helpers.AudioDataset(corpus, partition, CONTEXT)
        for partition in helpers.PARTITIONS
    }


@pytest.fixture
def loaders(data):
    return tuple(
        helpers.make_loader(data[partition], 256, shuffle=partition == "train-clean-100")
        for partition in helpers.PARTITIONS
    )


def settings(book, **changes):
    return {**book.config, **PLAIN, **changes}


def built(book, config, loaders=(None, None, None), steps=10):
    """A run with the notebook's parts, from one seed, and these loaders; on the CPU in float32."""
    torch.manual_seed(23)
    train_data = loaders[0] and loaders[0].dataset
    run = SimpleNamespace(
        config=config,
        model=book.Network(INPUT, len(PHONEMES), config),
        precision=torch.float32,
        criterion=book.make_criterion(config, train_data),
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        **dict(zip(("train_loader", "val_loader", "test_loader"), loaders)),
    )
    run.optimizer = book.make_optimizer(config, run.model)
    run.scheduler = book.make_scheduler(
        config, run.optimizer, len(loaders[0]) if loaders[0] else steps
    )
    return run


def layer_names(model):
    return [type(layer).__name__ for layer in model.model]


# ---- The pencil ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pencil():
    namespace = definitions()
    torch.manual_seed(23)
    return namespace["Network"](2828, 42, namespace["config"])


def test_the_pencil_has_exactly_its_layers(pencil):
    assert layer_names(pencil) == ["Linear", "BatchNorm1d", "LeakyReLU", "Dropout"] * 7 + [
        "Linear",
        "LeakyReLU",
    ]
    shapes = [
        (layer.in_features, layer.out_features)
        for layer in pencil.model
        if isinstance(layer, nn.Linear)
    ]
    assert shapes == [(2828, 1600)] + [(1600, 1600)] * 6 + [(1600, 42)]
    rates = [layer.p for layer in pencil.model if isinstance(layer, nn.Dropout)]
    assert rates == [0.24, 0.225, 0.215, 0.205, 0.2, 0.2, 0.2]
    assert {layer.negative_slope for layer in pencil.model if isinstance(layer, nn.LeakyReLU)} == {
        0.01
    }
    assert {layer.num_features for layer in pencil.model if isinstance(layer, nn.BatchNorm1d)} == {
        1600
    }
    assert sum(parameter.numel() for parameter in pencil.parameters()) == 19_985_642
    assert list(dict(pencil.named_children())) == ["model"]


def test_a_state_dict_of_the_original_loads_strictly(pencil):
    original, size = {}, 2828
    for i in range(7):
        original |= {
            f"model.{4 * i}.weight": torch.ones(1600, size),
            f"model.{4 * i}.bias": torch.ones(1600),
        }
        original |= {
            f"model.{4 * i + 1}.{name}": torch.ones(1600)
            for name in ("weight", "bias", "running_mean", "running_var")
        }
        original[f"model.{4 * i + 1}.num_batches_tracked"] = torch.tensor(1)
        size = 1600
    original |= {"model.28.weight": torch.ones(42, 1600), "model.28.bias": torch.ones(42)}
    copy.deepcopy(pencil).load_state_dict(original, strict=True)


def test_the_summary_is_that_of_the_homework(pencil, capsys):
    before = {name: tensor.clone() for name, tensor in pencil.state_dict().items()}
    summary(pencil.eval(), torch.zeros(1, 101, 28))
    printed = capsys.readouterr().out
    assert re.search(r"# Params: +19,985\.64K", printed) and re.search(
        r"# Mult-Adds: +19\.96M", printed
    )
    assert all(tensor.equal(before[name]) for name, tensor in pencil.state_dict().items())


def test_the_pencil_starts_kaiming_uniform_with_zero_biases(pencil):
    for layer in pencil.model:
        if isinstance(layer, nn.Linear):
            bound = math.sqrt(
                6 / layer.in_features
            )  # torch's own default would be smaller by sqrt(6)
            assert 0.98 * bound < layer.weight.abs().max() <= bound
            assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
            assert not layer.bias.any()


def test_forward_flattens_from_the_second_dimension(pencil):
    pencil.eval()
    frames = torch.randn(3, 101, 28, dtype=torch.float16)
    with torch.no_grad():
        logits = pencil(frames)
        assert logits.shape == (3, 42) and logits.dtype == torch.float32
        assert logits.equal(pencil.model(frames.reshape(3, 2828).float()))


# ---- Every option --------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", range(2, 9))
def test_the_widths_of_the_archetypes(book, layers):
    expected = {
        "pencil": [1600] * 7,
        "cylinder": [1600] * layers,
        "pyramid": [512, 256, 128, 64, 32, 16, 8, 4][:layers],
        "inverse-pyramid": [64, 128, 256, 512, 1024, 2048, 4096, 8192][:layers],
        "diamond": {
            2: [352, 352],
            3: [352, 704, 352],
            4: [352, 704, 704, 352],
            5: [352, 704, 1408, 704, 352],
            6: [352, 704, 1408, 1408, 704, 352],
            7: [352, 704, 1408, 2816, 1408, 704, 352],
            8: [352, 704, 1408, 2816, 2816, 1408, 704, 352],
        }[layers],
    }
    assert set(expected) == set(OPTIONS["archetype"])
    for archetype, widths in expected.items():
        config = settings(book, archetype=archetype, num_layers=layers)
        with torch.device("meta"):
            network = book.Network(INPUT, 42, config)
        sizes = [layer.out_features for layer in network.model if isinstance(layer, nn.Linear)]
        assert sizes == [*widths, 42], archetype


ACTIVATIONS = {  # as formulas
    "gelu": lambda x: x * (1 + torch.erf(x / math.sqrt(2))) / 2,
    "relu": lambda x: x.clamp(min=0),
    "leakyrelu": lambda x: torch.where(x < 0, 0.01 * x, x),
    "tanh": lambda x: (x.exp() - (-x).exp()) / (x.exp() + (-x).exp()),
    "softplus": lambda x: (1 + x.exp()).log(),
    "sigmoid": lambda x: 1 / (1 + (-x).exp()),
}


@pytest.mark.parametrize("name", OPTIONS["activations"])
def test_activations(book, name):
    model = built(book, settings(book, activations=name)).model
    kinds = layer_names(model)
    assert kinds[::2] == ["Linear"] * 4 and len(set(kinds[1::2])) == 1 and len(kinds) == 7
    x = torch.linspace(-3, 3, 50)
    torch.testing.assert_close(model.model[1](x), ACTIVATIONS[name](x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "norm, norm_alternate, dropout, dropout_alternate, expected",
    [
        (False, False, 0, False, "LA LA LA LA L"),
        (True, False, 0, False, "LBA LBA LBA LBA L"),
        (True, True, 0, True, "LBA LA LBA LA L"),
        (False, True, 0.3, False, "LAD LAD LAD LAD L"),
        (False, False, 0.3, True, "LAD LA LAD LA L"),
        (True, True, 0.3, True, "LBAD LA LBAD LA L"),
        (True, True, 0.3, False, "LBAD LAD LBAD LAD L"),
        (True, False, 0.3, True, "LBAD LBA LBAD LBA L"),
    ],
)
def test_where_batch_norm_and_dropout_stand(
    book, norm, norm_alternate, dropout, dropout_alternate, expected
):
    model = built(
        book,
        settings(
            book,
            num_layers=4,
            batch_norm=norm,
            batchnorm_alternate=norm_alternate,
            dropout=dropout,
            dropout_alternate=dropout_alternate,
        ),
    ).model
    letters = {"Linear": "L", "BatchNorm1d": "B", "LeakyReLU": "A", "Dropout": "D"}
    assert "".join(map(letters.get, layer_names(model))) == expected.replace(" ", "")
    assert {layer.p for layer in model.model if isinstance(layer, nn.Dropout)} <= {0.3}


@pytest.mark.parametrize("scheme", OPTIONS["weight_initialization"])
def test_weight_initialization(book, scheme):
    model = built(book, settings(book, weight_initialization=scheme)).model
    for layer in model.model:
        if not isinstance(layer, nn.Linear):
            continue
        inputs, outputs = layer.in_features, layer.out_features
        deviation = {
            "kaiming_uniform": math.sqrt(2 / inputs),
            "kaiming_normal": math.sqrt(2 / inputs),
            "xavier_uniform": math.sqrt(2 / (inputs + outputs)),
            "uniform": math.sqrt(1 / inputs / 3),
            "xavier_normal": math.sqrt(2 / (inputs + outputs)),
            None: math.sqrt(1 / inputs / 3),
        }[scheme]
        assert layer.weight.std().item() == pytest.approx(deviation, rel=0.05)
        spread = (
            layer.weight.abs().max().item() / deviation
        )  # of a uniform distribution it is sqrt(3)
        assert (
            spread > 2.5
            if "normal" in str(scheme)
            else spread == pytest.approx(math.sqrt(3), rel=0.01)
        )
        assert layer.bias.any() == (scheme is None)
    if scheme is None:
        torch.manual_seed(23)
        assert nn.Linear(INPUT, 512).weight.equal(model.model[0].weight)


OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {"momentum": 0.9, "nesterov": False}),
    "nesterov": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "adam": (torch.optim.Adam, {}),
    "adamw": (torch.optim.AdamW, {}),
    "rmsprop": (torch.optim.RMSprop, {}),
}


@pytest.mark.parametrize("name", OPTIONS["optimizers"])
def test_optimizers(book, name):
    kind, flags = OPTIMIZERS[name]
    run = built(book, settings(book, optimizers=name, learning_rate=0.005, weight_decay=0.002))
    [group] = run.optimizer.param_groups
    assert type(run.optimizer) is kind
    assert {"lr": 0.005, "weight_decay": 0.002, **flags}.items() <= group.items()
    assert sum(map(torch.numel, group["params"])) == sum(map(torch.numel, run.model.parameters()))


PLATEAU = {"reducelronplateau": {"losses": [1.0] * 12}}  # the one that wants to know the losses


def rates(book, epochs, scheduler, losses=None, lr_scale=1):
    """The learning rate in each epoch, stepped as `fit` does."""
    config = settings(
        book, learning_rate=0.001, scheduler=scheduler, epochs=epochs, lr_scale=lr_scale
    )
    run = built(book, config)
    result = []
    for epoch in range(epochs):
        result.append(run.optimizer.param_groups[0]["lr"])
        run.optimizer.step()
        run.scheduler.step(*([losses[epoch]] if losses else []))
    return np.array(result)


def test_cosineanneal_gives_the_rates_that_the_original_printed(book):
    printed = {
        1: "0.0010000",
        2: "0.0009999",
        5: "0.0009982",
        50: "0.0007590",
        76: "0.0005000",
        88: "0.0003757",
    }
    actual = rates(book, 150, "cosineanneal")
    assert {epoch: f"{actual[epoch - 1]:.7f}" for epoch in printed} == printed
    assert (np.diff(actual) < 0).all() and actual[-1] > 0


def test_steplr_and_exponential(book):
    assert rates(book, 25, "steplr") == pytest.approx([0.001] * 10 + [0.0005] * 10 + [0.00025] * 5)
    assert rates(book, 25, "exponential") == pytest.approx(0.001 * 0.95 ** np.arange(25))


def test_reducelronplateau_waits_for_the_loss_to_stop_falling(book):
    falling = rates(book, 12, "reducelronplateau", [1 / (epoch + 1) for epoch in range(12)])
    assert set(falling) == {0.001}
    level = rates(
        book, 12, "reducelronplateau", [1.0] * 12
    )  # patience 3: halved after 4 epochs in vain
    assert level == pytest.approx([0.001] * 5 + [0.0005] * 4 + [0.00025] * 3)


@pytest.mark.parametrize(
    "augmentations, rows, columns",
    [
        ("FreqMask", False, True),
        ("TimeMask", True, False),
        ("Both", True, True),
        (None, False, False),
    ],
)
def test_train_masks_as_the_config_says(book, loaders, augmentations, rows, columns):
    seen = []
    config = settings(book, augmentations=augmentations, freq_mask_param=4, time_mask_param=3)
    run = built(book, config, loaders)
    run.model.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].clone()))
    book.train(run)
    # only windows without padding: zero rows are there already
    windows = torch.cat(
        [frames[(frames != 0).any(2).sum(1) >= frames.shape[1] - 3] for frames in seen]
    )
    inner = windows[(windows[:, 0] != 0).any(1) & (windows[:, -1] != 0).any(1)]
    assert bool((inner == 0).all(2).any()) == rows
    # a column is zero by a mask only: of normalised coefficients hardly any is exactly zero
    assert bool((inner == 0).all(1).any()) == columns


@pytest.mark.slow
def test_masks_on_seventy_percent_of_the_train_batches_and_never_in_eval(book, loaders):
    calls = []
    book.namespace["mask_frames"] = lambda *arguments: calls.append(arguments) or arguments[0]
    config = settings(book, augmentations="Both", freq_mask_param=5, time_mask_param=7)
    run = built(book, config, loaders)
    torch.manual_seed(1)
    batches = 0
    for _ in range(20):
        book.train(run)
        batches += len(loaders[0])
    share, error = len(calls) / batches, math.sqrt(0.7 * 0.3 / batches)
    assert abs(share - 0.7) < 3 * error
    assert all(call[1:] == ("Both", 5, 7) for call in calls)
    calls.clear()
    book.eval(run, loaders[1])
    book.test(run, loaders[2])
    assert not calls


@pytest.mark.parametrize("warp", [0, 0.2])
def test_warps_in_the_batches_that_have_masks_if_the_config_says_so(book, loaders, warp):
    calls = []
    book.namespace["warp_frames"] = lambda frames, maps: calls.append(("warp", len(maps)))
    book.namespace["mask_frames"] = lambda frames, *_: calls.append("mask") or frames
    run = built(book, settings(book, warp=warp), loaders)
    book.train(run)
    masks = calls.count("mask")
    assert masks and calls == ([("warp", 41), "mask"] if warp else ["mask"]) * masks
    calls.clear()
    book.eval(run, loaders[1])
    assert not calls


def test_the_prediction_is_the_mean_over_the_warps(book, data):
    loader = helpers.make_loader(data["dev-clean"], 300)
    run = built(book, settings(book, warp=0.2, test_warps=5))
    model = run.model.eval()
    frames, _ = data["dev-clean"][torch.arange(len(data["dev-clean"]))]
    expected = 0
    for strength, which in (
        (0.08, 0),
        (0.04, 0),
        (0.04, 1),
        (0.04, 2),
        (0.08, 2),
    ):  # 0.92, 0.96, 1, 1.04, 1.08
        map = helpers.warp_maps(strength, data["dev-clean"], count=3)[which]
        with torch.no_grad():
            expected = expected + model(frames.float() @ map).log_softmax(1) / 5
    ours = book.log_probabilities(run, loader)
    torch.testing.assert_close(ours, expected.log_softmax(1), rtol=1e-3, atol=1e-3)
    plain = torch.cat([logits.log_softmax(1) for logits, _ in book.infer(run, loader)])
    assert (ours - plain).abs().max() > 0.01
    for off in ({"test_warps": 1}, {"warp": 0}):
        run.config = {**run.config, **off}
        assert book.log_probabilities(run, loader).equal(plain)
        run.config |= {"warp": 0.2, "test_warps": 5}


@pytest.mark.parametrize(
    "archetype, scale, expected",
    [
        ("pencil", 0.25, [0.06, 0.05625, 0.05375, 0.05125, 0.05, 0.05, 0.05]),
        ("pencil", 1, [0.24, 0.225, 0.215, 0.205, 0.2, 0.2, 0.2]),
        ("pencil", 0, [0] * 7),
        ("cylinder", 0.5, [0.2] * 3),
        ("cylinder", 4, [0.99] * 3),
    ],
)
def test_dropout_scale_is_a_factor_of_all_rates(book, archetype, scale, expected):
    config = settings(
        book, archetype=archetype, dropout=0.4, dropout_alternate=False, dropout_scale=scale
    )
    model = book.make_network(config, DATA_28)
    for epoch in (1, 2):
        assert book.set_dropout(model, config, 1000, epoch) == scale
        rates = [layer.p for layer in model.model if isinstance(layer, nn.Dropout)]
        assert rates == pytest.approx(expected)


def test_the_fewer_frames_per_parameter_the_more_dropout_in_the_end(book):
    config = settings(book, dropout=0.2, dropout_alternate=False, dropout_scale="auto", epochs=5)
    model = book.make_network(config, DATA_28)  # 512, 256, 128 wide
    parameters = sum(map(torch.numel, model.parameters()))
    ends = {}
    for ratio in (0.001, 0.01, 0.1, 1, 1.8, 10):
        scales = []
        for epoch in range(1, 6):
            scales.append(book.set_dropout(model, config, round(ratio * parameters), epoch))
            rates = [layer.p for layer in model.model if isinstance(layer, nn.Dropout)]
            assert rates == pytest.approx(
                [0.2 * scales[-1] * width / 1600 for width in (512, 256, 128)]
            )
        assert scales == pytest.approx(np.linspace(scales[0], scales[-1], 5))
        ends[ratio] = scales[0], scales[-1]
        assert (
            book.set_dropout(model, {**config, "epochs": 1}, round(ratio * parameters), 1)
            == scales[0]
        )
    assert (
        ends[0.001] == (0.1, 2)
        and ends[0.01][1] == ends[0.1][1] == 2 > ends[1][1] > ends[1.8][1] > ends[10][1]
    )
    assert ends[1.8] == pytest.approx((1, 1), abs=1e-3)
    assert ends[1] == pytest.approx((1 / 1.8**0.6, 1.8**0.6), abs=1e-3)
    assert ends[10] == pytest.approx((0.18**0.6, 0.18**0.6), abs=1e-3)


def test_a_layer_wider_than_the_pencils_has_no_higher_rate(book):
    config = settings(
        book,
        archetype="diamond",
        num_layers=7,
        dropout=0.2,
        dropout_alternate=False,
        dropout_scale="auto",
        epochs=1,
    )
    model = book.make_network(config, DATA_28)
    assert book.set_dropout(
        model, config, round(1.8 * sum(map(torch.numel, model.parameters()))), 1
    ) == (pytest.approx(1, abs=1e-3))
    rates = [layer.p for layer in model.model if isinstance(layer, nn.Dropout)]
    assert rates == pytest.approx([0.044, 0.088, 0.176, 0.2, 0.176, 0.088, 0.044], rel=1e-3)


def test_dropout_is_scaled_in_every_epoch(book, loaders, tmp_path):
    config, seen = settings(book, dropout=0.2, dropout_scale="auto", epochs=3), {}
    run = built(book, config, loaders)
    frames, expected = len(loaders[0].dataset), {}
    [layer, *_] = [layer for layer in run.model.model if isinstance(layer, nn.Dropout)]
    for epoch in (1, 2, 3):
        book.set_dropout(run.model, config, frames, epoch)
        expected[epoch] = layer.p
    run.model.register_forward_pre_hook(lambda *_: seen.update({loaders[0].sampler.epoch: layer.p}))
    fit(book, run, tmp_path)
    assert seen == expected and expected[3] > expected[1]


@pytest.mark.parametrize("scheduler", OPTIONS["scheduler"])
def test_lr_scale_is_a_factor_of_the_learning_rate(book, scheduler):
    assert rates(book, 12, scheduler, **PLATEAU.get(scheduler, {}), lr_scale=2) == pytest.approx(
        2 * rates(book, 12, scheduler, **PLATEAU.get(scheduler, {}))
    )


@pytest.mark.parametrize(
    "archetype, layers, factor",
    [
        ("pencil", 7, 2),
        ("cylinder", 3, 2),
        ("pyramid", 3, 2 * math.sqrt(1600 / 512)),
        ("diamond", 7, 2 * math.sqrt(1600 / 2816)),
    ],
)
def test_narrow_networks_take_larger_steps(book, archetype, layers, factor):
    config = settings(
        book, archetype=archetype, num_layers=layers, learning_rate=0.003, lr_scale="auto"
    )
    [group] = book.make_optimizer(config, book.Network(28, 42, config)).param_groups
    assert group["lr"] == pytest.approx(0.003 * factor)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIONS["optimizers"])
@pytest.mark.parametrize("scheduler", OPTIONS["scheduler"])
def test_every_optimizer_learns_with_every_scheduler(book, data, tmp_path, optimizer, scheduler):
    loaders = [helpers.make_loader(data["dev-clean"], 256, shuffle) for shuffle in (True, False)]
    rate = 0.02 if optimizer in ("sgd", "nesterov") else 0.001
    config = settings(
        book,
        optimizers=optimizer,
        scheduler=scheduler,
        epochs=3,
        learning_rate=rate,
        num_layers=2,
        batch_norm=True,
    )
    helpers.check_config(config, OPTIONS)
    history = fit(book, built(book, config, loaders), tmp_path)
    losses = [row["train_loss"] for row in history]
    assert np.isfinite(losses).all() and losses[0] > losses[1] > losses[2]
    assert history[0]["learning_rate"] == rate


# ---- Metrics -------------------------------------------------------------------------------------


def one_by_one(model, dataset, indexes):
    """Mean loss, accuracy and predictions over frames, one frame at a time."""
    losses, right, predictions = [], [], []
    model.eval()
    with torch.no_grad():
        for index in indexes:
            frames, phoneme = dataset[index]
            logits = model(frames[None].float())[0].double()
            losses.append((logits.logsumexp(0) - logits[phoneme]).item())
            predictions.append(logits.argmax().item())
            right.append(predictions[-1] == phoneme)
    return math.fsum(losses) / len(losses), sum(right) / len(right), predictions


def test_eval_is_exact_over_all_frames_with_a_smaller_last_batch(book, data):
    dataset = data["dev-clean"]
    loader = helpers.make_loader(dataset, 500)
    assert len(dataset) % 500
    run = built(book, settings(book))
    loss, accuracy, _ = one_by_one(run.model, dataset, range(len(dataset)))
    assert book.eval(run, loader) == (pytest.approx(loss, rel=1e-6), accuracy)


def test_train_metrics_are_exact_over_all_frames(book, corpus):
    dataset = helpers.AudioDataset(corpus, "train-clean-100", CONTEXT, subset=0.2)
    size = (len(dataset) - 50) // 3  # a last batch much smaller than the others
    loader = helpers.make_loader(dataset, size, shuffle=True)
    assert 50 <= len(dataset) % size < 60
    run = built(book, settings(book, learning_rate=0), [loader])
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    loss, accuracy = book.train(run)
    assert all(tensor.equal(before[name]) for name, tensor in run.model.state_dict().items())
    expected_loss, expected_accuracy, _ = one_by_one(run.model, dataset, range(len(dataset)))
    assert loss == pytest.approx(expected_loss, rel=1e-6) and accuracy == expected_accuracy


def test_a_train_step_is_that_of_the_textbook(book, data):
    config = settings(
        book, optimizers="sgd", learning_rate=0.01, weight_decay=0.01, batch_norm=True
    )
    loader = helpers.make_loader(data["dev-clean"], 600, shuffle=True)
    run = built(book, config, [loader])
    reference = built(book, config).model.train()
    momenta = [torch.zeros_like(parameter) for parameter in reference.parameters()]
    loader.sampler.set_epoch(1)
    book.train(run)
    for frames, phonemes in loader:
        loss = nn.functional.cross_entropy(reference(frames), phonemes)
        gradients = torch.autograd.grad(loss, list(reference.parameters()))
        with torch.no_grad():
            for parameter, gradient, momentum in zip(reference.parameters(), gradients, momenta):
                momentum.mul_(0.9).add_(gradient + 0.01 * parameter)
                parameter -= 0.01 * momentum
    for (name, ours), theirs in zip(
        run.model.state_dict().items(), reference.state_dict().values()
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=name)


def test_eval_leaves_weights_and_statistics_alone_and_is_repeatable(book, loaders):
    run = built(book, settings(book, batch_norm=True, dropout=0.5, augmentations="Both", warp=0.2))
    model = run.model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert book.eval(run, loaders[1]) == book.eval(run, loaders[1])
    book.test(run, loaders[2])
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_test_gives_the_phonemes_of_infers_logits_in_order(book, data):
    dataset, labelled = data["test-clean"], data["dev-clean"]
    run = built(book, settings(book))
    predictions = book.test(run, helpers.make_loader(dataset, 300))
    assert predictions.shape == (len(dataset),)
    model = run.model.eval()
    with torch.no_grad():
        expected = [PHONEMES[model(dataset[i][None]).argmax()] for i in range(len(dataset))]
    assert predictions.tolist() == expected
    # scoring takes the same way
    logits = torch.cat(
        [logits for logits, _ in book.infer(run, helpers.make_loader(labelled, 300))]
    )
    assert logits.argmax(1).tolist() == one_by_one(model, labelled, range(len(labelled)))[2]
    assert [phonemes for _, phonemes in book.infer(run, helpers.make_loader(dataset, 300))].count(
        None
    ) > 1


# ---- fit: what goes wrong in an epoch ------------------------------------------------------------


def fit(book, run, folder):
    run.folder, run.wandb, run.drive = folder, helpers.NoWandb(), None
    run.code = helpers.code_of_network(run.model) | book.code_that_trains(run)
    run.message = helpers.start_or_resume(
        run, helpers.load_checkpoint(folder / "checkpoint.pt", run.config)
    )
    return book.fit(run)


def in_epoch(loader, number, action):
    """Let `action` happen when the loader has given a few batches of epoch `number`."""
    batches, epoch = loader.sampler.__class__.__iter__, loader.sampler

    class Sampler(helpers.Batches):
        def __iter__(self):
            for i, batch in enumerate(batches(self)):
                if i == 3 and self.epoch == number:
                    action()
                yield batch

    epoch.__class__ = Sampler


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_the_checkpoint(book, loaders, tmp_path):
    config = settings(book, epochs=3)
    run = built(book, config, loaders)
    in_epoch(loaders[0], 2, lambda: run.model.model[0].weight.data.fill_(float("nan")))
    with pytest.raises(
        RunError, match="epoch 2 is not finite.* epoch 1 is intact.*learning rate 0.0001,"
    ):
        fit(book, run, tmp_path)
    for name in ("checkpoint.pt", "best.pt"):
        assert torch.load(tmp_path / name)["model"]["model.0.weight"].isfinite().all()
    assert len(helpers.load_checkpoint(tmp_path / "checkpoint.pt", config)["history"]) == 1


def test_an_absurd_learning_rate_ends_in_a_readable_error(book, loaders, tmp_path):
    config = settings(book, optimizers="sgd", learning_rate=100, epochs=3)
    with pytest.raises(RunError, match="not finite"):
        fit(book, built(book, config, loaders), tmp_path)


@pytest.mark.parametrize("place", ["train", "eval"])
def test_out_of_memory_names_the_batch_size_and_a_smaller_one(book, loaders, tmp_path, place):
    config = settings(book, epochs=2, batch_size=256)
    run = built(book, config, loaders)

    def forward(model, arguments):
        if model.training == (place == "train"):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    run.model.register_forward_pre_hook(forward)
    with pytest.raises(RunError, match="memory.*256.*128"):
        fit(book, run, tmp_path)
    assert helpers.load_checkpoint(tmp_path / "checkpoint.pt", config)["history"] == []
