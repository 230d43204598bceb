"""The order in which to read the tests, and in which they run; and what many of them use."""

import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]
pytest.register_assert_rewrite("support")

from support.reference import cut_corpus  # noqa: E402

import helpers  # noqa: E402

torch.set_num_threads(1)  # small matrices are quickest so, above all beside other work

READING_ORDER = {
    "data": [
        "test_data",  # windows, labels, the order of the batches
        "test_columns",  # HTK's columns and torchaudio's; 28 of them, or fewer
        "test_cache",  # the packed copy
        "test_practice",  # the practice corpus
        "test_librispeech",  # the LibriSpeech corpus
    ],
    "augmentation": ["test_masks"],  # masks, warps, dropout
    "network and training": [
        "test_config",
        "test_training",  # network, optimizers, schedules, loops
        "test_cuda",
        "test_additions",  # parts of one's own
    ],
    "decoding and metrics": ["test_decoding", "test_metrics"],
    "resuming": [
        "test_resume",  # checkpoints, kills, full disks
        "test_code",  # a run belongs to the code that made it
        "test_runs",  # finished runs
        "test_edited",  # cells edited, run twice, out of order, interrupted
    ],
    "submission": ["test_submission"],
    "damage": ["test_bad_data", "test_interrupts"],
    "rooms": [
        "test_sources",  # where the data come from: beside the notebook, Kaggle's mounts
        "test_drive",  # Google Drive
        "test_secrets",  # no keys in the files
    ],
    "wandb": ["test_wandb"],
    "the whole notebook": ["test_notebook"],
}


def pytest_configure(config):
    config.addinivalue_line(
        "markers", 'slow: left out by pytest -m "not slow", which covers the core of each subject'
    )


def pytest_collection_modifyitems(items):
    """Put the files in READING_ORDER; one that is not in it comes last."""
    modules = [module for modules in READING_ORDER.values() for module in modules]

    def place(item):
        name = item.module.__name__
        return modules.index(name) if name in modules else len(modules)

    items.sort(key=place)


@pytest.fixture(scope="session")
def practice_corpus(tmp_path_factory):
    """A practice corpus of 24, 4 and 3 utterances; read only."""
    root = tmp_path_factory.mktemp("practice") / "corpus"
    helpers.make_practice_corpus(root, (24, 4, 3))
    return root


@pytest.fixture(scope="session")
def corpus(practice_corpus, tmp_path_factory):
    """The same, each utterance cut after two seconds: a network learns it in seconds. Read only."""
    return cut_corpus(practice_corpus, tmp_path_factory.mktemp("tiny") / "corpus", frames=200)


@pytest.fixture(autouse=True)
def seed():
    """What a test draws from the global generators is the same in each run."""
    random.seed(23)
    np.random.seed(23)
    torch.manual_seed(23)


@pytest.fixture
def draw():
    """Random moments, others in each run. The seed is shown where the test fails."""
    seed = random.SystemRandom().randrange(2**32)
    print(f"draw = random.Random({seed})")
    return random.Random(seed)
