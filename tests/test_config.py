"""check_config: what each key of the config may be, and what is said of the others."""

import re

import pytest
from notebook import definitions

BOOK = definitions()
CONFIG, OPTIONS, check_config = (BOOK[name] for name in ("config", "OPTIONS", "check_config"))


def test_the_notebooks_own_config_passes():
    check_config(CONFIG)
    assert set(CONFIG) == set(OPTIONS)
    assert all(CONFIG[key] == value for key, value in {
        "subset": 1, "context": 50, "archetype": "pencil", "activations": "leakyrelu", "batch_norm": True,
        "batchnorm_alternate": False, "learning_rate": 0.001, "dropout": 0.225, "dropout_alternate": True,
        "num_layers": 7, "optimizers": "adamw", "scheduler": "cosineanneal", "epochs": 150, "batch_size": 2048,
        "weight_decay": 0.001, "weight_initialization": "kaiming_uniform", "augmentations": "FreqMask",
        "freq_mask_param": 4, "time_mask_param": 8}.items())


@pytest.mark.parametrize("key", [key for key, allowed in OPTIONS.items() if isinstance(allowed, list)])
def test_every_option_passes_and_others_are_refused_with_the_options(key):
    for option in OPTIONS[key]:
        check_config({**CONFIG, key: option})
    for wrong in ("nonsense", 1, 0, 1.0, [], float("nan"), "None", "none", str(OPTIONS[key][0]).upper()):
        with pytest.raises(ValueError) as error:
            check_config({**CONFIG, key: wrong})
        assert repr(key) in str(error.value) and repr(wrong) in str(error.value)
        assert all(repr(option) in str(error.value) for option in OPTIONS[key])


@pytest.mark.parametrize("name", ["a/b", "..", "../a", "a\\b", ".hidden", "", "x" * 201, None, True, 5, b"x", []])
def test_a_name_that_is_none_of_a_folder_in_runs_is_refused(name):
    with pytest.raises(ValueError, match="'Name' is .* allowed: 1 to 200 characters"):
        check_config({**CONFIG, "Name": name})
    for good in ("x", "x" * 200, "lr=0.001, Jürgen's"):
        check_config({**CONFIG, "Name": good})


@pytest.mark.parametrize("key", [key for key, allowed in OPTIONS.items() if isinstance(allowed, tuple)])
def test_numbers_outside_their_range_or_of_another_type_are_refused(key):
    kind, low, high = OPTIONS[key]
    wrong = [None, True, False, [], float("nan"), float("inf"), -float("inf"), low - 1, high + 1, -1, 10**400]
    wrong += ["1", "0.001", "nan"]
    wrong += [5.0, 2.5] if kind is int else []
    for value in wrong:
        with pytest.raises(ValueError, match=f"'{key}' is .* allowed: {re.escape(str(low))} to {high}"):
            check_config({**CONFIG, key: value})
    for value in (low, high):
        check_config({**CONFIG, key: value})


def test_unknown_and_missing_keys_are_named_all_at_once():
    config = {**CONFIG, "lr": 1, "archetype": "tower"}
    del config["epochs"]
    with pytest.raises(ValueError) as error:
        check_config(config)
    for part in ("unknown key 'lr'", "learning_rate, ", "the key 'epochs' is missing", "'tower'", "'pyramid'"):
        assert part in str(error.value)
