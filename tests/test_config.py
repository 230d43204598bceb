"""check_config: what each key of the config may be, and what is said of the others."""

import json
import re

import numpy as np
import pytest
import torch
from support.notebook import definitions

import helpers

BOOK = definitions()
CONFIG, OPTIONS = BOOK["config"], BOOK["options"]()


def check_config(config):
    return helpers.check_config(config, OPTIONS)


def test_the_notebooks_own_config_passes():
    check_config(CONFIG)
    assert set(CONFIG) == set(OPTIONS)
    assert CONFIG == helpers.DEFAULTS
    assert all(
        CONFIG[key] == value
        for key, value in {
            "subset": 1,
            "context": 50,
            "archetype": "pencil",
            "activations": "leakyrelu",
            "batch_norm": True,
            "batchnorm_alternate": False,
            "learning_rate": 0.001,
            "dropout": 0.225,
            "dropout_alternate": True,
            "num_layers": 7,
            "optimizers": "adamw",
            "scheduler": "cosineanneal",
            "epochs": 150,
            "batch_size": 2048,
            "weight_decay": 0.001,
            "weight_initialization": "kaiming_uniform",
            "augmentations": "FreqMask",
            "freq_mask_param": 4,
            "time_mask_param": 8,
        }.items()
    )


@pytest.mark.parametrize(
    "key",
    [key for key, allowed in OPTIONS.items() if isinstance(allowed, list) and str not in allowed],
)
def test_every_option_passes_and_others_are_refused_with_the_options(key):
    for option in OPTIONS[key]:
        check_config({**CONFIG, key: option})
        for spelling in (str(option), str(option).upper(), str(option).title()):
            assert check_config({**CONFIG, key: spelling})[key] == option
    for wrong in ("nonsense", 1, 0, 1.0, [], float("nan"), "", f"{OPTIONS[key][0]} "):
        with pytest.raises(ValueError) as error:
            check_config({**CONFIG, key: wrong})
        assert repr(key) in str(error.value) and repr(wrong) in str(error.value)
        assert all(repr(option) in str(error.value) for option in OPTIONS[key])


@pytest.mark.parametrize(
    "name",
    [
        "a/b",
        "..",
        "../a",
        "a\\b",
        ".hidden",
        "",
        "x" * 201,
        None,
        True,
        5,
        b"x",
        [],
        "ü" * 101,
        "cache",
        "Cache",
        " x",
        "x ",
        "x.",
        "a\nb",
        "a\0b",
        "a:b",
        "why?",
        "[1]",
        "\ud800",
    ],
)
def test_a_name_that_is_none_of_a_folder_in_runs_is_refused(name):
    with pytest.raises(ValueError, match="'Name' is .* allowed: 1 to 200 characters"):
        check_config({**CONFIG, "Name": name})
    for good in ("x", "x" * 200, "ü" * 100, "lr=0.001, Jürgen's", "exp 1 (lr=0.01)"):
        check_config({**CONFIG, "Name": good})


@pytest.mark.parametrize(
    "key, value, plain",
    [
        ("learning_rate", np.logspace(-4, -2, 5)[2], 0.001),
        ("epochs", np.int64(3), 3),
        ("dropout", np.float32(0.25), 0.25),
        ("batch_norm", np.bool_(False), False),
        ("archetype", np.str_("diamond"), "diamond"),
        ("warp", torch.tensor(0.125), 0.125),
        ("context", np.array(7), 7),
    ],
    ids=str,
)
def test_what_a_loop_over_numpys_numbers_gives_becomes_pythons(key, value, plain):
    config = check_config({**CONFIG, key: value})
    assert config[key] == pytest.approx(plain) if isinstance(plain, float) else config[key] == plain
    assert type(config[key]) is type(plain) and config is not CONFIG
    assert json.loads(json.dumps(config)) == config


def test_the_name_of_a_variant_says_its_changes_where_there_is_room():
    assert helpers.variant_name({}) == "base"
    assert helpers.variant_name({"b": 0.5, "a": "x"}) == "a=x,b=0.5"
    many = {key: value for key, value in CONFIG.items() if key not in ("Name", "data")}
    names = [
        helpers.variant_name(changes)
        for changes in (many, {**many, "dropout": 0.3}, {"x": "a/b:c"}, {"x": "."})
    ]
    assert len(set(names)) == 4
    for name in names:
        check_config({**CONFIG, "Name": name})


@pytest.mark.parametrize(
    "key", [key for key, allowed in OPTIONS.items() if isinstance(allowed, tuple)]
)
def test_numbers_outside_their_range_or_of_another_type_are_refused(key):
    kind, low, high, *others = OPTIONS[key]
    wrong = [
        None,
        True,
        False,
        [],
        float("nan"),
        float("inf"),
        -float("inf"),
        low - 1,
        high + 1,
        -1,
        10**400,
    ]
    wrong += ["1", "0.001", "nan"]
    wrong += [5.0, 2.5] if kind is int else []
    wrong += [np.zeros(2), "automatic"]
    for value in wrong:
        with pytest.raises(
            ValueError, match=f"'{key}' is .* allowed: {re.escape(str(low))} to {high}"
        ):
            check_config({**CONFIG, key: value})
    for value in (low, high, *others):
        check_config({**CONFIG, key: value})
    for value in others:
        assert check_config({**CONFIG, key: str(value).upper()})[key] == value


STARTER = {  # as a course's starter has it, in other spellings
    "Name": "me",
    "subset": 1.0,
    "context": 20,
    "activations": "GELU",
    "learning_rate": 0.002,
    "dropout": 0.25,
    "optimizers": "SGD",
    "scheduler": "ReduceLROnPlateau",
    "epochs": 20,
    "batch_size": 1024,
    "weight_decay": 0.05,
    "weight_initialization": None,
    "augmentations": "Both",
    "freq_mask_param": 4,
    "time_mask_param": 8,
}


def test_a_starters_config_is_completed_by_our_defaults():
    config = helpers.check_config(STARTER, OPTIONS, helpers.DEFAULTS)
    assert config == {
        **CONFIG,
        **STARTER,
        "activations": "gelu",
        "optimizers": "sgd",
        "scheduler": "reducelronplateau",
    }
    with pytest.raises(ValueError, match="the key 'recipe' is missing"):
        helpers.check_config(STARTER, OPTIONS)


def test_unknown_and_missing_keys_are_named_all_at_once():
    config = {**CONFIG, "lr": 1, "archetype": "tower"}
    del config["epochs"]
    with pytest.raises(ValueError) as error:
        check_config(config)
    for part in (
        "unknown key 'lr'",
        "learning_rate, ",
        "the key 'epochs' is missing",
        "'tower'",
        "'pyramid'",
    ):
        assert part in str(error.value)
