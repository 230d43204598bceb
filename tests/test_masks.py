"""What training does to a batch: masks, warps of the frequency axis, dropout."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchaudio

import helpers
from helpers import Dropout, mask_frames, warp_frames, warp_maps

WINDOWS, FRAMES, COEFFICIENTS = 20_000, 21, 28


def stretches(masked, dim):
    """(first zero, number of zeros) along `dim` of each window of masked ones.

    The mask of a window must be one whole stretch.
    """
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
    assert ((counts - expected) ** 2 / expected).sum() < categories - 1 + 5 * math.sqrt(
        2 * max(categories - 1, 1)
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(
    "augmentations, dim, size, param",
    [
        ("FreqMask", 2, COEFFICIENTS, 4),
        ("FreqMask", 2, COEFFICIENTS, 1),
        ("FreqMask", 2, COEFFICIENTS, 28),
        ("TimeMask", 1, FRAMES, 8),
        ("TimeMask", 1, FRAMES, 500),
    ],
)
def test_widths_and_positions_are_uniform(augmentations, dim, size, param, dtype):
    frames = torch.ones(WINDOWS, FRAMES, COEFFICIENTS, dtype=dtype)
    assert mask_frames(frames, augmentations, param, param) is frames  # in place
    starts, widths = stretches(frames, dim)
    widest = min(param, size)
    assert_uniform(widths, widest + 1)
    for width in range(1, widest + 1):
        assert_uniform(
            starts[widths == width], size - width + 1
        )  # any that fits, the last row included


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


def test_a_mask_of_another_name_is_refused():
    with pytest.raises(
        ValueError, match="no mask 'freqmask'; expected 'FreqMask', 'TimeMask', 'Both' or None"
    ):
        mask_frames(torch.ones(2, FRAMES, COEFFICIENTS), "freqmask")


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
@pytest.mark.parametrize(
    "view",
    [
        lambda frames: frames[::2],
        lambda frames: frames[:, 1:-1],
        lambda frames: frames.transpose(0, 1),
    ],
)
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
        torch.ones(WINDOWS, 1, FRAMES, COEFFICIENTS), param + 1, 0.0, dim + 1
    ).squeeze(1)
    (_, our_widths), (_, their_widths) = stretches(ours, dim), stretches(theirs, dim)
    counts = np.array(
        [np.bincount(widths, minlength=param + 1) for widths in (our_widths, their_widths)]
    )
    assert counts.shape == (2, param + 1)
    difference = (counts[0] - counts[1]) ** 2 / counts.sum(0)
    assert difference.sum() < param + 5 * math.sqrt(2 * param)
    our_rows, their_rows = (
        ((masked == 0).all(3 - dim)).float().mean(0) for masked in (ours, theirs)
    )
    inside = slice(param, -param)
    np.testing.assert_allclose(
        our_rows[inside], their_rows[inside], rtol=0.16
    )  # fewer positions: each more likely
    assert their_rows[-1] < 0.25 * our_rows[-1]
    assert our_rows[0].item() == pytest.approx(our_rows[-1].item(), rel=0.15)


# ---- Warps ---------------------------------------------------------------------------------------


def data_of(stds, convention):
    return SimpleNamespace(stds=stds, convention=convention, coefficients=len(stds))


def natural(column, convention, coefficients):
    """Which coefficient this column is, and what it was multiplied by."""
    if convention == "torchaudio":
        return column, 1
    if column == coefficients - 1:
        return 0, math.sqrt(2)
    i = column + 1
    return i, 1 + 11 * math.sin(math.pi * i / 22)


def mel(hertz):
    return 2595 * math.log10(1 + hertz / 700)


def slowly_warped(features, factor, convention):
    """One frame (k,), by way of the bands' log energies, read at `factor` x their frequencies."""
    n = len(features)
    bands = max({"HTK": 28, "torchaudio": 40}[convention], n)

    def basis(i, band):
        return math.sqrt((1 if i == 0 else 2) / bands) * math.cos(
            math.pi * i * (band + 0.5) / bands
        )

    known = [natural(column, convention, n) for column in range(n)]
    energies = [
        sum(value / by * basis(i, band) for value, (i, by) in zip(features, known))
        for band in range(bands)
    ]
    centres = [mel(8000) * (band + 1) / (bands + 1) for band in range(bands)]  # in mel
    moved = [mel(factor * 700 * (10 ** (centre / 2595) - 1)) for centre in centres]
    energies = np.interp(moved, centres, energies)
    return [by * sum(energies[band] * basis(i, band) for band in range(bands)) for i, by in known]


@pytest.mark.parametrize("convention", ["HTK", "torchaudio"])
@pytest.mark.parametrize("n", [13, 27, 28, 41])
def test_warp_maps_are_the_way_through_the_mel_bands_and_back(convention, n):
    stds = torch.rand(n) * 10 + 0.1
    maps = warp_maps(0.2, data_of(stds, convention), count=5)
    assert maps.shape == (5, n, n) and maps.dtype == torch.float32
    mfcc = torch.randn(n) * stds
    for factor, each in zip((0.8, 0.9, 1.0, 1.1, 1.2), maps):
        # the standard deviations after the warp, of uncorrelated coefficients: made 1 again
        units = [slowly_warped((unit * stds).tolist(), factor, convention) for unit in torch.eye(n)]
        shrunk = np.sqrt((np.array(units) ** 2).sum(0)) / stds.numpy()
        expected = (
            np.array(slowly_warped(mfcc.tolist(), factor, convention)) / stds.numpy() / shrunk
        )
        np.testing.assert_allclose((mfcc / stds) @ each, expected, rtol=1e-3, atol=3e-3)
    torch.testing.assert_close(maps[2], torch.eye(n), rtol=0, atol=1e-4)


def test_there_are_no_maps_without_strength_or_a_known_convention():
    assert warp_maps(0, data_of(torch.ones(28), "HTK")) is None
    assert warp_maps(0.2, data_of(torch.ones(28), None)) is None


def test_a_warp_moves_a_resonance():
    bands = torch.arange(40)
    energies = torch.exp(-(((bands - 20) / 3.0) ** 2))
    dct = torchaudio.functional.create_dct(28, 40, "ortho")
    maps = warp_maps(0.2, data_of(torch.ones(28), "torchaudio"), 3)
    down, same, up = ((energies @ dct @ each @ dct.T).argmax() for each in maps)
    assert up < same < down and same == 20  # read at a higher frequency, everything lies lower


@pytest.mark.parametrize("convention", ["HTK", "torchaudio"])
def test_maps_of_a_constant_coefficient_are_finite(convention):
    stds = torch.rand(28) + 1
    stds[3] = 0
    assert warp_maps(0.2, data_of(stds, convention)).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_each_window_goes_through_one_of_the_maps(dtype):
    maps = warp_maps(0.2, data_of(torch.ones(28), "torchaudio"), count=7)
    original = torch.randn(300, 5, 28).to(dtype)
    frames = original.clone()
    assert warp_frames(frames, maps) is frames and frames.dtype == dtype
    errors = torch.stack(
        [(original.float() @ each - frames.float()).abs().amax((1, 2)) for each in maps]
    )
    assert errors.amin(0).max() < 0.02  # float16
    assert set(errors.argmin(0).tolist()) == set(range(7))


# Speech played faster has all its frequencies higher by the same factor. That is physics, and no
# formula of ours.

RATE = 16000


def synthetic_speech():
    """Two utterances by the synthesiser, at 16 kHz."""
    for text, voice in (
        ("The quick brown fox jumps over the lazy dog.", "adam"),
        ("Five wine jars.", "steph"),
    ):
        audio = torch.from_numpy(helpers.speak(text, voice)[0])
        yield torchaudio.functional.resample(audio, helpers.ESPEAK_RATE, RATE)


def formant_noise():
    """Four seconds of noise through three resonances that wander, and whose loudness changes."""
    t = torch.arange(4 * RATE) / RATE
    noise = torch.randn(len(t), generator=torch.Generator().manual_seed(1))
    loud = 0.1 + torch.sin(5 * t) ** 2
    audio = 0.01 * torch.randn(len(t), generator=torch.Generator().manual_seed(2))
    for hertz, speed in ((500, 3.1), (1500, 2.3), (2500, 1.7)):
        phase = 2 * torch.pi * torch.cumsum(hertz * (1 + 0.3 * torch.sin(speed * t)), 0) / RATE
        slow = torchaudio.functional.lowpass_biquad(noise, RATE, 150)
        audio = audio + slow * torch.cos(phase)
    return [loud * audio]


def htk_features(audio, n):
    return torch.from_numpy(helpers.speech_features((audio / 8).numpy(), RATE))[
        :, [*range(n - 1), 27]
    ], 200


def torchaudio_features(audio, n):
    """torchaudio's MFCCs, unliftered; their window is the middle 400 samples of 512."""
    mfcc = torchaudio.transforms.MFCC(
        RATE,
        n_mfcc=n,
        log_mels=True,
        melkwargs={
            "n_fft": 512,
            "win_length": 400,
            "hop_length": 160,
            "n_mels": 40,
            "center": False,
        },
    )
    return mfcc(audio).T, 256


def at_times(features, times, centre):
    """Features (T, k), interpolated at these times in seconds.

    centre: of the first window, in samples.
    """
    own = (np.arange(len(features)) * 160 + centre) / RATE
    return np.stack([np.interp(times, own, column) for column in features.T.numpy()], axis=1)


def correlations(make_features, convention, n, speed, utterances):
    """How well a map predicts each column (n,) of these utterances played at `speed`."""
    rows = []
    for audio in utterances:
        audio = audio + 0.01 * audio.std() * torch.randn(
            len(audio), generator=torch.Generator().manual_seed(3)
        )
        fast = torchaudio.functional.resample(audio, round(RATE * speed), RATE)
        (features, centre), (truth, _) = make_features(audio, n), make_features(fast, n)
        stds = features.std(0)
        # a formant at f is found at speed x f: the new features read the old ones at f / speed
        strength = abs(1 - 1 / speed)
        maps = warp_maps(strength, data_of(stds, convention), count=2)
        warped = (features - features.mean(0)) / stds @ maps[0 if speed > 1 else 1]
        times = (np.arange(len(truth)) * 160 + centre) / RATE * speed
        predicted = at_times(warped, times, centre)
        rows.append([np.corrcoef(predicted[:, i], truth[:, i])[0, 1] for i in range(n)])
    return np.mean(rows, axis=0)


@pytest.mark.parametrize("speed", [1.1, 0.9])
@pytest.mark.parametrize("utterances", [synthetic_speech, formant_noise])
@pytest.mark.parametrize(
    "convention, make_features, n",
    [
        ("HTK", htk_features, 28),
        ("HTK", htk_features, 27),
        ("HTK", htk_features, 13),
        ("torchaudio", torchaudio_features, 28),
        ("torchaudio", torchaudio_features, 13),
    ],
)
def test_a_warp_does_what_playing_it_faster_does(convention, make_features, n, utterances, speed):
    audio = list(utterances())
    right = correlations(make_features, convention, n, speed, audio)
    low = [column for column in range(n) if natural(column, convention, n)[0] <= 12]
    assert right[n - 1 if convention == "HTK" else 0] > 0.97  # c0
    assert right[low].min() > 0.75 and right[low].mean() > 0.9
    assert right.mean() > 0.75
    # the other convention's map takes another column for the loudness
    wrong = correlations(
        make_features, {"HTK": "torchaudio", "torchaudio": "HTK"}[convention], n, speed, audio
    )
    assert wrong[-1] < (0.5 if n > 22 else 0.9)  # the lifter is negative from c23 on
    assert wrong.mean() < right.mean() - (0.1 if n > 22 else 0.02)


# ---- Dropout -------------------------------------------------------------------------------------


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
    assert (dropped.float().mean(0) - p).abs().max() < 6 * (
        p * (1 - p) / 257
    ) ** 0.5 + 1e-9  # no unit more than others
    neighbours = (
        (dropped[:, 1:] & dropped[:, :-1]).float().mean()
    )  # four share a random number: they are independent
    assert abs(neighbours - p**2) < 5 * (p**2 * (1 - p**2) / y.numel()) ** 0.5 + 1e-9
    y.sum().backward()
    assert torch.equal(x.grad == 0, dropped)
    torch.manual_seed(5)
    assert torch.equal(layer(x), y)
    assert p == 0 or not torch.equal(layer(x) == 0, dropped)
    assert torch.equal(layer.eval()(x), x)
