"""Training on CUDA: on a real GPU where there is one, and rehearsed on fake tensors everywhere.

Fake tensors know their device and shape, and refuse to mix devices.
"""

from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from support import kills
from support.configs import TINY
from support.notebook import TRAINING, Session, definitions
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import helpers


def can_rehearse():
    """Older releases of torch, such as 2.6, ask a driver even for fake tensors."""
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            torch.zeros(2).to("cuda")[:, None]
    except (RuntimeError, AssertionError):
        return False
    return True


CAN_REHEARSE = can_rehearse()
OPTIONS = definitions()["options"]()


class NoWay(TorchDispatchMode):
    """Fails where an operation has an input on CUDA and a result on the CPU."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        devices = [
            {leaf.device.type for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)}
            for values in ((args, kwargs or {}), result)
        ]
        assert not ("cuda" in devices[0] and "cpu" in devices[1]), (
            f"{function} brings something to the CPU"
        )
        return result


class Generator:
    """In place of torch's, which needs a real GPU."""

    def __init__(self, device):
        assert torch.device(device).type == "cuda"

    def manual_seed(self, seed):
        pass


def truth(tensor):
    """In place of `bool(tensor)`, as a fake tensor has no value."""
    assert tensor.device.type == "cpu", "an if on the GPU's result waits for the GPU"
    return True


@contextmanager
def rehearsal():
    if not CAN_REHEARSE:
        pytest.skip("this torch needs a driver for fake tensors")
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        NoWay(),
        mock.patch.object(torch, "Generator", Generator),
        mock.patch.object(torch.Tensor, "__bool__", truth),
    ):
        yield


@pytest.fixture
def dataset(corpus):
    """Of a dataset on the CPU, what `device="cuda"` would make."""

    def on_cuda(partition):
        data = helpers.AudioDataset(corpus, partition, TINY["context"])
        with FakeTensorMode(allow_non_fake_inputs=True):
            for name in ("frames", "offsets", "labels", "stds"):
                if getattr(data, name) is not None:
                    setattr(data, name, getattr(data, name).to("cuda"))
            data.windows = data.frames.as_strided(
                data.windows.shape, data.windows.stride(), data.windows.storage_offset()
            )
        return data

    return on_cuda


# ---- On a real GPU -------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_on_a_gpu_a_run_learns_and_resumed_ends_with_the_same_bits(corpus, tmp_path):
    whole = Session(tmp_path / "whole", corpus, TINY)
    whole.run_all()
    assert next(whole["model"].parameters()).device.type == "cuda"
    first, second = (row["train_loss"] for row in whole["history"])
    assert second < first
    submission = whole["run"].folder / "submission.csv"
    labels = helpers.read_submission(submission, len(whole["test_data"]))
    assert list(labels) == list(whole["predictions"])

    stopped = Session(tmp_path / "stopped", corpus, TINY)
    stopped.run_all(until=TRAINING)
    run_epoch = stopped["run_epoch"]

    def stop_at_the_second(run, epoch):
        if epoch == 2:
            raise KeyboardInterrupt
        return run_epoch(run, epoch)

    stopped.namespace["run_epoch"] = stop_at_the_second
    with pytest.raises(KeyboardInterrupt):
        stopped.run(TRAINING)
    resumed = Session(tmp_path / "stopped", corpus, TINY)
    resumed.run_all()
    assert "1 of 2 epochs are there, resuming" in resumed["run"].message
    assert kills.outcome(tmp_path / "stopped") == kills.outcome(tmp_path / "whole")


# ---- Rehearsed -----------------------------------------------------------------------------------


def check(tensor, *shape, dtype):
    assert (tensor.device.type, tuple(tensor.shape), tensor.dtype) == ("cuda", shape, dtype)


def test_the_rehearsal_notices_mixed_devices_and_copies():
    with pytest.raises(RuntimeError, match="different devices|same device"), rehearsal():
        torch.zeros(3, device="cuda") + torch.zeros(3)
    with pytest.raises(AssertionError, match="to the CPU"), rehearsal():
        torch.zeros(3, device="cuda").cpu()
    with pytest.raises(AssertionError, match="waits"), rehearsal():
        bool(torch.zeros(3, device="cuda").any())
    with pytest.raises(DataDependentOutputException), rehearsal():
        torch.zeros((), device="cuda").item()


def test_batches_windows_and_the_order(dataset):
    data, unlabelled = dataset("train-clean-100"), dataset("test-clean")
    length, width = len(data), 2 * TINY["context"] + 1
    with rehearsal():
        loader = helpers.make_loader(data, 256, shuffle=True)
        batches = list(loader.sampler)
        assert len(batches) == len(loader)
        check(batches[0], 256, dtype=torch.int64)
        check(batches[-1], length - 256 * (len(loader) - 1), dtype=torch.int64)
        frames, phonemes = data[batches[0]]
        check(frames, 256, width, 28, dtype=torch.float16)
        check(phonemes, 256, dtype=torch.int64)
        check(data[5][0], width, 28, dtype=torch.float16)
        [first, *_] = helpers.make_loader(unlabelled, 100).sampler
        check(unlabelled[first], 100, width, 28, dtype=torch.float16)


@pytest.mark.parametrize("augmentations", OPTIONS["augmentations"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_masks(augmentations, dtype):
    with rehearsal():
        frames = torch.zeros(64, 11, 28, dtype=dtype, device="cuda")
        check(helpers.mask_frames(frames, augmentations), 64, 11, 28, dtype=dtype)


def test_warps():
    with rehearsal():
        frames = torch.zeros(64, 11, 28, dtype=torch.float16, device="cuda")
        data = SimpleNamespace(
            coefficients=28, convention="HTK", stds=torch.ones(28, device="cuda")
        )
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            maps = helpers.warp_maps(0.2, data, dtype=dtype)
            check(helpers.warp_frames(frames, maps), 64, 11, 28, dtype=torch.float16)


@pytest.mark.slow
@pytest.mark.parametrize(
    "archetype, weighted",
    [
        ("pyramid", True),
        *(pytest.param(each, False, marks=pytest.mark.slow) for each in OPTIONS["archetype"]),
    ],
)
def test_the_loops_without_backward(dataset, monkeypatch, archetype, weighted):
    book = definitions()
    book["device"] = "cuda"
    config = {**book["config"], **TINY, "archetype": archetype, "augmentations": "Both"}
    train_data, test_data = dataset("train-clean-100"), dataset("test-clean")
    read = []

    def item(tensor):  # once an epoch for each number
        read.append(tensor.device.type)
        return 0.5

    monkeypatch.setattr(torch.Tensor, "item", item)
    monkeypatch.setattr(torch.Tensor, "backward", lambda tensor: check(tensor, dtype=torch.float32))
    monkeypatch.setattr(
        torch.Tensor, "cpu", lambda tensor: tensor
    )  # the sums, at the end of an epoch
    steps = []
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    optimizer.step = lambda: steps.append(1)
    with rehearsal():
        with torch.device("cuda"):
            model = book["Network"](11 * 28, 42, {**config, "weight_initialization": None})
            weights = {"weight": torch.ones(42), "ignore_index": 0} if weighted else {}
        run = SimpleNamespace(
            config=config,
            model=model,
            precision=torch.float32,
            optimizer=optimizer,
            criterion=torch.nn.CrossEntropyLoss(**weights),
            scaler=torch.amp.GradScaler("cuda", enabled=False),
            train_loader=helpers.make_loader(train_data, 256, shuffle=True),
        )
        book["train"](run)
        assert len(steps) == -(-len(train_data) // 256)
        assert read.count("cuda") == 2  # the loss and the accuracy
        book["eval"](run, helpers.make_loader(train_data, 256))
        assert read.count("cuda") == 4
        for logits, _ in book["infer"](run, helpers.make_loader(test_data, 256)):
            assert logits.device.type == "cuda" and logits.dtype == torch.float32
        check(
            book["log_probabilities"](run, helpers.make_loader(test_data, 256)),
            len(test_data),
            42,
            dtype=torch.float32,
        )


def test_viterbi(monkeypatch):
    monkeypatch.setattr(FakeTensor, "tolist", lambda tensor: [3, 2, 1])  # the lengths, read once
    with rehearsal():
        scores, transitions = torch.zeros(6, 42, device="cuda"), torch.zeros(42, 42, device="cuda")
        offsets = torch.tensor([0, 3, 5, 6], device="cuda")
        check(helpers.viterbi(scores, transitions, offsets), 6, dtype=torch.int64)
