import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]
pytest.register_assert_rewrite("support")

import helpers  # noqa: E402


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A tiny practice corpus, read only: 24, 4 and 3 utterances."""
    root = tmp_path_factory.mktemp("practice") / "corpus"
    helpers.make_practice_corpus(root, (24, 4, 3))
    return root


@pytest.fixture(scope="module")
def one_thread():
    """Small matrices are quickest in one thread, above all beside other work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
