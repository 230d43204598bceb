"""What training does to a batch: masks beside torchaudio's, warps against a slow reference, dropout."""

import math

import numpy as np
import pytest
import torch
import torchaudio

from helpers import Dropout, mask_frames, warp_frames, warp_maps

WINDOWS, FRAMES, COEFFICIENTS = 20_000, 21, 28


def stretches(masked, dim):
    """(first zero, number of zeros) along `dim` of each window of masked ones; a mask must be one whole stretch."""
    zeros = masked == 0
    rows = zeros.any(3 - dim)  # (B, size)
    assert torch.equal(zeros, rows.unsqueeze(3 - dim).expand_as(zeros))
    widths = rows.sum(1)
    starts = rows.int().argmax(1)
    last = rows.shape[1] - 1 - rows.flip(1).int().argmax(1)
    assert torch.equal((last - starts + 1)[widths > 0], widths[widths > 0])
    return starts.numpy(), widths.numpy()


def assert_uniform(values, categories):
    """Chi-square, five standard deviations above its mean."""
    counts = np.bincount(values, minlength=categories)
    assert len(counts) == categories
    expected = len(values) / categories
    assert ((counts - expected)**2 / expected).sum() < categories - 1 + 5 * math.sqrt(2 * max(categories - 1, 1))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(23)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("augmentations, dim, size, param", [
    ("FreqMask", 2, COEFFICIENTS, 4), ("FreqMask", 2, COEFFICIENTS, 1), ("FreqMask", 2, COEFFICIENTS, 28),
    ("TimeMask", 1, FRAMES, 8), ("TimeMask", 1, FRAMES, 500)])
def test_widths_and_positions_are_uniform(augmentations, dim, size, param, dtype):
    frames = torch.ones(WINDOWS, FRAMES, COEFFICIENTS, dtype=dtype)
    assert mask_frames(frames, augmentations, param, param) is frames  # in place
    starts, widths = stretches(frames, dim)
    widest = min(param, size)
    assert_uniform(widths, widest + 1)
    for width in range(1, widest + 1):
        assert_uniform(starts[widths == width], size - width + 1)  # any that fits, the last row included


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("augmentations", ["FreqMask", "TimeMask", "Both", None])
def test_only_zeros_are_added(augmentations, dtype):
    original = torch.randn(200, FRAMES, COEFFICIENTS).to(dtype)
    original[0, 0, :3] = torch.tensor([torch.finfo(dtype).max, torch.finfo(dtype).tiny, -0.0])
    masked = mask_frames(original.clone(), augmentations, 10, 10)
    assert masked.dtype == dtype and masked.shape == original.shape
    assert ((masked == original) | (masked == 0)).all()
    assert not torch.signbit(masked)[(masked == 0) & (original != 0)].any()
    assert torch.equal(masked, original) == (augmentations is None)


def test_both_is_one_of_each():
    frames = mask_frames(torch.ones(WINDOWS, FRAMES, COEFFICIENTS), "Both", 4, 8)
    columns, rows = (frames == 0).all(1), (frames == 0).all(2)
    assert torch.equal(frames == 0, columns.unsqueeze(1) | rows.unsqueeze(2))
    freq_widths = columns.sum(1)[~rows.all(1)]
    time_widths = rows.sum(1)[~columns.all(1)]
    assert_uniform(freq_widths.numpy(), 5)
    assert_uniform(time_widths.numpy(), 9)
    assert abs(np.corrcoef(freq_widths, time_widths)[0, 1]) < 0.04


def test_every_window_has_a_mask_of_its_own():
    frames = mask_frames(torch.ones(WINDOWS, FRAMES, COEFFICIENTS), "FreqMask", 4)
    starts, widths = stretches(frames, 2)
    assert len(set(zip(starts[widths > 0], widths[widths > 0]))) == 28 + 27 + 26 + 25
    assert 0.7 < (widths[1:] != widths[:-1]).mean() < 0.9  # neighbours differ in 4 of 5 cases


@pytest.mark.parametrize("augmentations", ["FreqMask", "TimeMask", "Both"])
def test_a_width_of_zero_masks_nothing(augmentations):
    assert mask_frames(torch.ones(500, FRAMES, COEFFICIENTS), augmentations, 0, 0).all()


@pytest.mark.parametrize("rows", [1, 3, 7, 8, 9, 16, 101])
def test_a_frequency_mask_covers_every_row(rows):
    frames = mask_frames(torch.ones(500, rows, COEFFICIENTS, dtype=torch.float16), "FreqMask", 4)
    assert torch.equal(frames, frames[:, :1].expand_as(frames))
    assert 0.7 < (frames == 0).any(2)[:, 0].float().mean() < 0.9  # in four of five windows


def test_a_single_frame_may_be_masked_whole():
    frames = mask_frames(torch.ones(1000, 1, COEFFICIENTS), "TimeMask", time_mask_param=8)
    share = (frames == 0).all(2).float().mean().item()
    assert share == pytest.approx(0.5, abs=0.08)


@pytest.mark.parametrize("augmentations", ["FreqMask", "TimeMask", "Both"])
@pytest.mark.parametrize("view", [lambda frames: frames[::2], lambda frames: frames[:, 1:-1],
                                  lambda frames: frames.transpose(0, 1)])
def test_frames_that_are_not_contiguous_are_masked_in_place(augmentations, view):
    frames = torch.ones(64, FRAMES, COEFFICIENTS)
    mask_frames(view(frames), augmentations)
    zeros = frames == 0
    assert zeros.any()
    view(zeros).zero_()
    assert not zeros.any()  # nothing outside the view


def test_the_same_seed_gives_the_same_masks():
    first, second, third = (torch.ones(100, FRAMES, COEFFICIENTS) for _ in range(3))
    for frames, seed in ((first, 1), (second, 1), (third, 2)):
        torch.manual_seed(seed)
        mask_frames(frames, "Both")
    assert torch.equal(first, second) and not torch.equal(first, third)


@pytest.mark.parametrize("augmentations, dim, param", [("FreqMask", 2, 4), ("TimeMask", 1, 8)])
def test_beside_torchaudios_masks(augmentations, dim, param):
    """torchaudio's widest mask is one below its parameter, and it leaves the last row out."""
    ours = mask_frames(torch.ones(WINDOWS, FRAMES, COEFFICIENTS), augmentations, param, param)
    theirs = torchaudio.functional.mask_along_axis_iid(
        torch.ones(WINDOWS, 1, FRAMES, COEFFICIENTS), param + 1, 0.0, dim + 1).squeeze(1)
    (_, our_widths), (_, their_widths) = stretches(ours, dim), stretches(theirs, dim)
    counts = np.array([np.bincount(widths, minlength=param + 1) for widths in (our_widths, their_widths)])
    assert counts.shape == (2, param + 1)
    difference = (counts[0] - counts[1])**2 / counts.sum(0)
    assert difference.sum() < param + 5 * math.sqrt(2 * param)
    our_rows, their_rows = (((masked == 0).all(3 - dim)).float().mean(0) for masked in (ours, theirs))
    inside = slice(param, -param)
    np.testing.assert_allclose(our_rows[inside], their_rows[inside], rtol=0.16)  # fewer positions: each more likely
    assert their_rows[-1] < 0.25 * our_rows[-1]
    assert our_rows[0].item() == pytest.approx(our_rows[-1].item(), rel=0.15)


# ---- Warps -------------------------------------------------------------------------------------------------

def mel(hertz):
    return 2595 * math.log10(1 + hertz / 700)


def slowly_warped(mfcc, factor, bands):
    """One frame (28,): back to the log energies of the bands, read at factor x their frequencies, and back again."""
    def basis(k, band):
        return math.sqrt((1 if k == 0 else 2) / bands) * math.cos(math.pi * k * (band + 0.5) / bands)

    energies = [sum(mfcc[k] * basis(k, band) for k in range(28)) for band in range(bands)]
    centres = [mel(8000) * (band + 1) / (bands + 1) for band in range(bands)]  # in mel
    moved = [mel(factor * 700 * (10 ** (centre / 2595) - 1)) for centre in centres]
    energies = np.interp(moved, centres, energies)
    return [sum(energies[band] * basis(k, band) for band in range(bands)) for k in range(28)]


@pytest.mark.parametrize("bands", [40, 80])
def test_warp_maps_are_the_way_through_the_mel_bands_and_back(bands):
    stds = torch.rand(28) * 10 + 0.1
    maps = warp_maps(0.2, stds, count=5, bands=bands)
    assert maps.shape == (5, 28, 28) and maps.dtype == torch.float32
    mfcc = torch.randn(28) * stds
    for factor, each in zip((0.8, 0.9, 1.0, 1.1, 1.2), maps):
        # of uncorrelated coefficients with standard deviation 1, each warped one has this one; it is made 1 again
        units = [slowly_warped((unit * stds).tolist(), factor, bands) for unit in torch.eye(28)]
        shrunk = np.sqrt((np.array(units) ** 2).sum(0)) / stds.numpy()
        expected = np.array(slowly_warped(mfcc.tolist(), factor, bands)) / stds.numpy() / shrunk
        np.testing.assert_allclose((mfcc / stds) @ each, expected, rtol=1e-3, atol=1e-3)
        assert shrunk[-1] < 0.95 or factor == 1
    torch.testing.assert_close(maps[2], torch.eye(28), rtol=0, atol=1e-4)


def test_a_warp_moves_a_resonance():
    bands = torch.arange(40)
    energies = torch.exp(-((bands - 20) / 3.0) ** 2)
    dct = torchaudio.functional.create_dct(28, 40, "ortho")
    down, same, up = ((energies @ dct @ each @ dct.T).argmax() for each in warp_maps(0.2, torch.ones(28), 3))
    assert up < same < down and same == 20  # read at a higher frequency, everything lies lower


def test_maps_of_a_constant_coefficient_are_finite():
    stds = torch.rand(28) + 1
    stds[3] = 0
    assert warp_maps(0.2, stds).isfinite().all() and warp_maps(0, torch.zeros(28) + 1).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_each_window_goes_through_one_of_the_maps(dtype):
    maps = warp_maps(0.2, torch.ones(28), count=7)
    original = torch.randn(300, 5, 28).to(dtype)
    frames = original.clone()
    assert warp_frames(frames, maps) is frames and frames.dtype == dtype
    errors = torch.stack([(original.float() @ each - frames.float()).abs().amax((1, 2)) for each in maps])
    assert errors.amin(0).max() < 0.02  # float16
    assert set(errors.argmin(0).tolist()) == set(range(7))


# ---- Dropout -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("p", [0.0, 0.05, 0.2, 0.5, 0.99])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_is_torchs(p, dtype):
    torch.manual_seed(5)
    layer, x = Dropout(p), torch.full((257, 1601), 3.0, dtype=dtype, requires_grad=True)
    y = layer(x)
    kept = torch.tensor(3.0, dtype=dtype) * torch.tensor(1.0, dtype=dtype).mul_(1 / (1 - p))
    assert y.dtype == dtype and set(y.unique().tolist()) <= {0.0, kept.item()}
    dropped = y == 0
    assert abs(dropped.float().mean() - p) < 5 * (p * (1 - p) / y.numel()) ** 0.5 + 1e-9
    assert (dropped.float().mean(0) - p).abs().max() < 6 * (p * (1 - p) / 257) ** 0.5 + 1e-9  # no unit more than others
    neighbours = (dropped[:, 1:] & dropped[:, :-1]).float().mean()  # four share a random number: they are independent
    assert abs(neighbours - p**2) < 5 * (p**2 * (1 - p**2) / y.numel()) ** 0.5 + 1e-9
    y.sum().backward()
    assert torch.equal(x.grad == 0, dropped)
    torch.manual_seed(5)
    assert torch.equal(layer(x), y)
    assert p == 0 or not torch.equal(layer(x) == 0, dropped)
    assert torch.equal(layer.eval()(x), x)
