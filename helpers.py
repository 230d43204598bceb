"""All that the notebook hw1p2_starter.ipynb (frame-level phoneme classification) does not show: data, metrics, files.

In the order in which the data flow:

    read_partition                              a folder of .npy files -> one array, packed and cached
    AudioDataset, make_loader                   windows of it, and batches of windows
    warp_frames, mask_frames                    what training does to a batch
    confusion_matrix, border_distance,
    calibration                                 how good predictions are
    Decoder                                     predictions -> the best path through each utterance
    save_checkpoint, load_checkpoint,
    snapshot, restore                           a run that can be carried on
    write_submission, read_submission           the CSV
    make_practice_corpus,
    make_librispeech_corpus, get_data           data for those who have none

The network, the training loop and the config are in the notebook.
"""

import _ctypes
import contextlib
import ctypes
import functools
import hashlib
import importlib
import io
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
import types
import warnings
import zipfile
from collections import deque
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context, parent_process
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torchaudio
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm.auto import tqdm

# ---- Constants ---------------------------------------------------------------------------------------------

PHONEMES = ("[SIL] AA AE AH AO AW AY B CH D DH EH ER EY F G HH IH IY JH K L M N NG OW OY P R S SH T TH UH UW V W Y "
            "Z ZH [SOS] [EOS]").split()
MANNERS = {  # manner of articulation -> phonemes, the order of the rows in the confusion matrix
    "silence": "[SIL]".split(),
    "vowels": "IY IH EH AE AH ER UW UH AO AA OW EY AY OY AW".split(),
    "glides, liquids": "Y W R L".split(),
    "nasals": "M N NG".split(),
    "stops": "P B T D K G".split(),
    "affricates": "CH JH".split(),
    "fricatives": "F V TH DH S Z SH ZH HH".split(),
}
PARTITIONS = ("train-clean-100", "dev-clean", "test-clean")
COEFFICIENTS = 28  # MFCCs a frame; a frame every 10 ms
COMPETITION = "11785-spring-25-hw-1-p-2"
KAGGLE_FOLDER = "11785-s25-hw1p2"
KAGGLE = Path("/kaggle")  # on Kaggle's own notebooks: input/ is what was attached, working/ is kept
OPTIONS = {  # config key -> the values it may take, or (type, lowest, highest)
    "Name": (str, 1, 200), "subset": (float, 1e-9, 1), "context": (int, 0, 1000),
    "archetype": ["pencil", "cylinder", "pyramid", "inverse-pyramid", "diamond"],
    "activations": ["gelu", "relu", "leakyrelu", "softplus", "tanh", "sigmoid"],
    "batch_norm": [True, False], "batchnorm_alternate": [True, False],
    "learning_rate": (float, 0, 100), "dropout": (float, 0, 0.99), "dropout_alternate": [True, False],
    "num_layers": (int, 2, 8), "optimizers": ["sgd", "nesterov", "adam", "adamw", "rmsprop"],
    "scheduler": ["steplr", "reducelronplateau", "exponential", "cosineanneal"],
    "epochs": (int, 1, 10**6), "batch_size": (int, 2, 10**7), "weight_decay": (float, 0, 100),
    "weight_initialization": ["kaiming_normal", "kaiming_uniform", "uniform", "xavier_normal", "xavier_uniform", None],
    "augmentations": ["FreqMask", "TimeMask", "Both", None],
    "freq_mask_param": (int, 0, COEFFICIENTS), "time_mask_param": (int, 0, 2001),
    "recipe": ["best", "original"], "iid_masks": [True, False], "warp": (float, 0, 0.5),
    "dropout_ramp": [True, False], "test_warps": (int, 1, 99), "smoothing": [True, False],
    "data": ["auto", "practice", "kaggle", "librispeech"], "shorten": [True, False],
    "wandb": ["auto", "online", "offline", "disabled"], "artifacts": [True, False],
    "drive": [True, False], "kaggle_submit": [True, False], "ablations": [True, False],
}
ORIGINAL = {  # what config["recipe"] = "original" sets
    "iid_masks": False, "warp": 0, "dropout_ramp": False, "test_warps": 1, "smoothing": False}


def check_config(config):
    """Raise a ValueError that lists every unknown or missing key and every value that is not allowed."""
    faults = [f"unknown key {key!r}; the keys are {', '.join(OPTIONS)}" for key in config if key not in OPTIONS]
    for key, allowed in OPTIONS.items():
        if key not in config:
            faults.append(f"the key {key!r} is missing")
        elif isinstance(allowed, list):
            if not any(config[key] is option or (type(config[key]) is type(option) and config[key] == option)
                       for option in allowed):
                faults.append(f"{key!r} is {config[key]!r}; allowed: {', '.join(map(repr, allowed))}")
        else:
            (kind, low, high), value = allowed, config[key]
            right = isinstance(value, (int, float) if kind is float else kind) and not isinstance(value, bool)
            if not (right and low <= (len(value) if kind is str else value) <= high):
                what = {str: "characters", int: "(a whole number)", float: "(a number)"}[kind]
                faults.append(f"{key!r} is {value!r}; allowed: {low} to {high} {what}")
    if re.search(r"[/\\]|^\.", str(config.get("Name"))):
        faults.append(f"'Name' is {config['Name']!r}; it names a folder, so it has no slashes and no dot at its start")
    if faults:
        raise ValueError("config: " + "\n        ".join(faults))


def have_keys(*names):
    """Are all these keys in the environment? Colab's secrets of these names are put there first."""
    for name in names:
        if name not in os.environ and "google.colab" in sys.modules:
            with contextlib.suppress(Exception):  # no such secret, or no access to it
                from google.colab import userdata
                os.environ[name] = userdata.get(name)
    return all(os.environ.get(name) for name in names)


def runs_folder(drive=False):
    """Where runs are kept: Google Drive if asked for (on Colab), else $HW1P2_RUNS, /kaggle/working/runs, runs/ here."""
    if drive and "google.colab" in sys.modules:
        from google.colab import drive as google_drive
        google_drive.mount("/content/drive")
        return Path("/content/drive/MyDrive/hw1p2-runs")
    kaggle = KAGGLE / "working"
    return Path(os.environ.get("HW1P2_RUNS") or (kaggle / "runs" if kaggle.is_dir() else "runs"))


def need(module):
    """Import a package that only some runs need, installed first where it is missing. A RunError where that fails."""
    try:
        return importlib.import_module(module)
    except ImportError:
        print(f"installing {module}")
    result = subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", module], capture_output=True, text=True)
    if result.returncode:
        raise RunError(f"this needs the package {module}, and pip could not install it: {result.stderr[-300:]}")
    importlib.invalidate_caches()
    return importlib.import_module(module)


def git_commit():
    """The commit of the code; None or empty outside a repository."""
    with contextlib.suppress(OSError):
        command = ["git", "-C", Path(__file__).parent, "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()


# ---- Errors ------------------------------------------------------------------------------------------------

class DataError(ValueError):
    """Bad input data. The message names the file, what is wrong with it, and what was expected."""


class RunError(RuntimeError):
    """A run that cannot go on. The message says what happened and what to do."""


@contextlib.contextmanager
def replacing(path, size=0):
    """Give a temporary path beside `path`; flush it and move it into place only if the block succeeds.

    A reader sees the old file or the new one, never a part. `size` is what is to be written, in bytes.

    Raises:
        RunError: the disk is full or cannot be written; the old file is untouched.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        # torch.save buries a full disk's OSError under a RuntimeError of its own, or loses it
        if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
            error = error.__context__
        if isinstance(error, (OSError, SafetensorError)) or "PytorchStreamWriter" in str(error):
            free = shutil.disk_usage(path.parent).free if path.parent.exists() else 0
            needed = f"{size / 1e6:.1f} MB are needed there, " if size else ""
            raise RunError(f"{path} could not be written ({error}): {needed}{free / 1e6:.1f} MB are free. "
                           "What was there before is unchanged. Free some space and run again.") from error
        raise


def in_order(pool, function, jobs):
    """Yield function(*job) for each job, worked on by the pool, in order; few jobs are taken in advance."""
    pending = deque()
    for job in jobs:
        pending.append(pool.submit(function, *job))
        if len(pending) >= 64:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


@contextlib.contextmanager
def alone(path):
    """Of two notebooks that make the same thing, let one into the block and the other wait until it comes out.

    Raises:
        RunError: the folder of `path` cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.with_name(f".{path.name}.lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            print(f"another notebook is making {path}: waiting for it")
            lock.acquire()
    except NotImplementedError:  # no locks on this file system
        lock = contextlib.nullcontext()
    except OSError as error:
        raise RunError(f"{path} cannot be made: {error}") from error
    with lock:
        yield


# ---- Reading: a folder of .npy files -> one packed array ---------------------------------------------------

GAP = 50  # zero rows between utterances, at least; contexts up to this share one cache file
KINDS = ("mfcc", "transcript")  # folders of a partition; test has the first one only
_INDEX = {phoneme: i for i, phoneme in enumerate(PHONEMES[:40])}


def _mfccs(array):
    """Check one utterance's MFCCs and normalise them over time: (x - mean) / (std + 1e-8), and that std (28,)."""
    if array.dtype.kind != "f" or array.dtype.itemsize > 8:
        raise ValueError(f"dtype {array.dtype}; expected float32")
    if array.ndim != 2 or len(array) < 1 or array.shape[1] != COEFFICIENTS:
        raise ValueError(f"shape {array.shape}; expected (frames, {COEFFICIENTS}) with at least one frame")
    with np.errstate(all="ignore"):
        # less the first row, a constant coefficient is exactly zero; a rounding error over 1e-8 would be anything
        array = np.subtract(array, array[0], dtype=np.float64)
        array -= array.mean(axis=0)
        deviation = np.sqrt(np.einsum("ij,ij->j", array, array) / len(array))
        array /= deviation + 1e-8
    if not np.isfinite(deviation).all():  # infinite too where the values are so large that their squares overflow
        raise ValueError("NaN, infinite or absurdly large values; expected finite MFCCs")
    return array, deviation


def _labels(array):
    """Check one utterance's transcript, text (T+2,), and turn it into indexes into PHONEMES, uint8 (T,)."""
    if array.dtype.kind != "U":
        raise ValueError(f"dtype {array.dtype}; expected text, <U5")
    if array.ndim != 1 or len(array) < 3:
        raise ValueError(f"shape {array.shape}; expected (frames + 2,) for [SOS], one phoneme a frame, [EOS]")
    if (array[0], array[-1]) != ("[SOS]", "[EOS]"):
        raise ValueError(f"it starts with {str(array[0])!r} and ends with {str(array[-1])!r}; expected [SOS] and [EOS]")
    array = array[1:-1]
    starts = np.flatnonzero(np.append(True, array[1:] != array[:-1]))  # a phoneme lasts: one lookup for all its frames
    phonemes = array[starts].tolist()
    for t, phoneme in zip(starts, phonemes):
        if phoneme not in _INDEX:
            raise ValueError(f"{phoneme!r} at frame {t} is not a phoneme; expected one of {' '.join(_INDEX)}")
    return np.repeat(np.array([_INDEX[phoneme] for phoneme in phonemes], np.uint8), np.diff(starts, append=len(array)))


def _contents(paths):
    """The bytes of each file, or the error that it cannot be read."""
    contents = []
    for path in paths:
        try:
            contents.append(path.read_bytes())
        except OSError as error:
            contents.append(error)
    return contents


def _load_npy(content):
    """The array in an .npy file of these bytes; an error that says what is wrong with it."""
    if isinstance(content, OSError):
        raise content
    file = io.BytesIO(content)
    try:
        array = np.lib.format.read_array(file, allow_pickle=False)
        if file.read(1):
            raise ValueError("there is more in it")
        return array
    except Exception as error:  # numpy's parser, Python's, and Python's tokenizer have a dozen kinds
        raise ValueError(f"{error}; expected one whole array in an .npy file") from None


def _convert(paths, contents):
    """(MFCCs, deviations, labels or None) of an utterance; in their place a list of what is wrong with its files."""
    arrays, faults = [], []
    for path, content, convert in zip(paths, contents, (_mfccs, _labels)):
        try:
            arrays.append(convert(_load_npy(content)))
        except Exception as error:  # whatever a damaged file provokes, it is that file's fault
            faults.append(f"{path}: {error}")
    if faults:
        return faults
    (mfcc, deviation), labels = arrays[0], arrays[1] if len(arrays) > 1 else None
    if labels is not None and len(labels) != len(mfcc):
        return [f"{paths[1]}: {len(labels)} phonemes; expected {len(mfcc)}, one a frame"]
    return mfcc, deviation, labels


def _raise_faults(folder, faults):
    if faults:
        more = [f"... and {len(faults) - 10:,} more"] if len(faults) > 10 else []
        raise DataError(_printable("\n".join([f"{folder}: {len(faults):,} fault(s) in the data", *faults[:10], *more])))


def _printable(text):
    """Text with file names as it can be printed: their bytes that are no text are escaped."""
    return text.encode(errors="backslashreplace").decode()


def _pack(folder, names, labelled, gap):
    """Read, check, normalise and pack the utterances of these names: what `read_partition` returns."""
    paths = [[folder / kind / name for kind in KINDS[:1 + labelled]] for name in names]
    # room for as many frames as the files can hold; what is not written to takes no memory
    rows = sum(path.stat().st_size for path, *_ in paths if path.exists()) // (2 * COEFFICIENTS)
    # from numpy, as torch converts to float16 many times as fast
    frames = torch.from_numpy(np.zeros((rows + gap * (len(names) + 1), COEFFICIENTS), np.float16))
    labels, lengths, deviations, faults, row = [], [], [], [], gap
    # small files on a slow disk (Drive) are waited for more than worked on
    with ThreadPoolExecutor(16) as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy's and Python's, about what stands in a damaged header
        contents = in_order(pool, _contents, zip(paths))  # only read there: Python runs one thread at a time
        for utterance in tqdm(map(_convert, paths, contents), f"reading {folder.name}", len(names), leave=False,
                              delay=10):
            if isinstance(utterance, list):
                faults += utterance
                continue
            mfcc, deviation, phonemes = utterance
            frames[row:row + len(mfcc)] = torch.from_numpy(mfcc)
            row += len(mfcc) + gap
            lengths.append(len(mfcc))
            deviations.append(deviation)
            labels.append(phonemes)
    _raise_faults(folder, faults)
    return {"frames": frames[:row], "starts": torch.tensor([0, *itertools.accumulate(lengths)]),
            "labels": torch.from_numpy(np.concatenate(labels) if labelled else np.zeros(0, np.uint8)),
            "deviations": torch.tensor(np.mean(deviations, axis=0), dtype=torch.float32)}


def _list_utterances(folder, labelled, subset):
    """Sorted names of a partition's first utterances; a DataError where one has no counterpart or none is left."""
    names = {}
    for kind in KINDS[:1 + labelled]:
        if not (folder / kind).is_dir():
            raise DataError(f"{folder / kind}: there is no such folder; expected ROOT/{{train-clean-100,dev-clean}}/"
                            "{mfcc,transcript}/*.npy and ROOT/test-clean/mfcc/*.npy")
        found = sorted(os.listdir(folder / kind))
        names[kind] = [name for name in found if name.endswith(".npy") and not name.startswith(".")]
        if ignored := sorted({*found} - {*names[kind]}):
            print(f"{folder.name}: ignored {len(ignored)} file(s) in {kind} that are not utterances: "
                  + ", ".join(map(_printable, ignored[:5])))
    mfccs, total = names["mfcc"], len(names["mfcc"])
    if not mfccs:
        raise DataError(f"{folder / 'mfcc'}: there are no .npy files in it; expected one for each utterance")
    if not labelled:
        return mfccs
    transcripts = names["transcript"]
    _raise_faults(folder, [f"{folder / 'mfcc' / name}: no transcript of the same name in {folder / 'transcript'}"
                           for name in sorted({*mfccs} - {*transcripts})]
                  + [f"{folder / 'transcript' / name}: no MFCC file of the same name in {folder / 'mfcc'}"
                     for name in sorted({*transcripts} - {*mfccs})])
    if int(subset * total) < 1:
        raise DataError(f"{folder}: subset {subset} of its {total} utterances is none; expected at least one")
    return mfccs[:int(subset * total)]


def _cache_key(folder, names, labelled, gap):
    """A digest of all that changes what the cache holds: format, gap, and each file's name, size and time."""
    def stamp(name):
        with contextlib.suppress(OSError):  # a link to nowhere: reading it tells
            stats = [os.stat(os.path.join(folder, kind, name)) for kind in KINDS[:1 + labelled]]
            return name, *((stat.st_size, stat.st_mtime_ns) for stat in stats)

    with ThreadPoolExecutor(16) as pool:
        stamps = [*in_order(pool, stamp, zip(names))]
    return hashlib.sha256(repr(("packed 3", folder.name, gap, stamps)).encode()).hexdigest()


def _open_cache(path, key):
    """The packed tensors of a cache file, mapped into memory; None where it is missing, partial or foreign."""
    with contextlib.suppress(Exception), safe_open(path, "pt") as file:  # whatever is wrong with it, it is made anew
        if file.metadata() == {"key": key}:
            return {name: file.get_tensor(name) for name in file.keys()}


def read_partition(root, partition, subset=1, gap=GAP, cache=None):
    """Read, check, normalise and pack one partition.

    Args:
        root: data folder in the course's layout.
        partition: "train-clean-100", "dev-clean", or "test-clean" (which has no transcripts and is always whole).
        subset: the first int(subset * n) utterances of the n, in sorted order.
        gap: rows of zeros before, between and after the utterances.
        cache: folder for a packed copy (safetensors), written once and then mapped.

    Returns:
        dict of CPU tensors: "frames" float16 (rows, 28), normalised per utterance, in zero rows of `gap`;
        "labels" uint8 (n frames,), empty for test; "starts" int64 (utterances + 1,), the first frame of each utterance
        and the number of all, counted without the gaps; "deviations" float32 (28,), the mean over the utterances of
        each coefficient's standard deviation before normalisation.

    Raises:
        DataError: names the faulty files, all of them (the first ten by name).
    """
    folder, labelled, packed = Path(root) / partition, partition != "test-clean", None
    names = _list_utterances(folder, labelled, subset)
    if cache is None:
        return _pack(folder, names, labelled, gap)
    key = _cache_key(folder, names, labelled, gap)
    path = Path(cache) / f"{partition}-{key[:16]}.safetensors"
    try:
        with alone(path):  # of two runs that start together, one reads the files
            if not (mapped := _open_cache(path, key)):
                packed = _pack(folder, names, labelled, gap)
                with replacing(path, packed["frames"].nbytes) as temporary:
                    save_file(packed, temporary, {"key": key})
                mapped = _open_cache(path, key)
            return mapped
    except RunError as error:  # the cache is a convenience
        print(f"going on without a cache: {error}")
        return packed or _pack(folder, names, labelled, gap)


# ---- Windows and loaders -----------------------------------------------------------------------------------

class AudioDataset(Dataset):
    """Frames of one partition, each with `context` frames on either side; zeros beyond the ends of its utterance.

    The utterances lie in one array on the device, rows of zeros between them. A window is 2c+1 of its rows. The view
    `windows`, whose row i shows the array from row i on, holds all of them without a copy; a batch is one gather.

        array     0 0 a b c d 0 0 e f g 0 0       two utterances, abcd and efg; context 2
        windows  [0 0 a b c]                      row 0: the window of frame a
                   [0 a b c d]                    row 1: of frame b
                              ...
                             [0 0 e f g]          row 6: of frame e

    Args:
        root, partition, subset, cache: see `read_partition`.
        context: frames on either side, c.
        device: where the array lies and the batches are made.

    Example:
        data = AudioDataset(root, "dev-clean", context=50)
        frames, phoneme = data[0]                      # float16 (101, 28), int64 ()
        frames, phonemes = data[torch.tensor([0, 7])]  # float16 (2, 101, 28), int64 (2,)
        For the partition "test-clean" there are no phonemes: data[0] is the frames alone.

    Raises:
        DataError: a fault in the files.
    """

    def __init__(self, root, partition="train-clean-100", context=50, subset=1, device="cpu", cache=None):
        self.partition, self.context, self.gap = partition, context, max(GAP, context)
        packed = read_partition(root, partition, subset, self.gap, cache)
        self.frames, self.starts, self.deviations = (packed[name].to(device)
                                                     for name in ("frames", "starts", "deviations"))
        self.labels = packed["labels"].to(device) if len(packed["labels"]) else None
        self.length, self.utterances = int(packed["starts"][-1]), len(packed["starts"]) - 1
        width = 2 * context + 1
        self.windows = self.frames.as_strided((len(self.frames) - width + 1, width * COEFFICIENTS), (COEFFICIENTS, 1))

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        if isinstance(index, torch.Tensor) and index.dim() == 1:
            return self._batch(index)
        index = range(self.length)[int(index)]  # an IndexError where it is out of range; negative ones from the end
        batch = self._batch(torch.tensor([index], device=self.frames.device))
        return batch[0] if self.labels is None else (batch[0][0], batch[1][0])

    def _batch(self, index):
        gaps = torch.searchsorted(self.starts, index, right=True)  # that lie before the frame: one an utterance
        out = None
        if self.frames.device.type == "cpu":  # numpy's large pages of memory come much quicker than torch's small ones
            out = torch.from_numpy(np.empty((len(index), self.windows.shape[1]), np.float16))
        frames = torch.index_select(self.windows, 0, index + self.gap * gaps - self.context, out=out)
        frames = frames.view(len(index), -1, COEFFICIENTS)
        return frames if self.labels is None else (frames, self.labels[index].long())

    def utterance(self, i):
        """(MFCCs float16 (T, 28), phoneme indexes uint8 (T,) or None for test) of the i-th utterance."""
        first, last = self.starts[i].item(), self.starts[i + 1].item()
        shift = self.gap * (i + 1)
        return self.frames[first + shift:last + shift], None if self.labels is None else self.labels[first:last]


class Batches(Sampler):
    """Batches of frame indexes: int64 tensors on the device, shuffled by `seed` and the epoch, or in order.

    torch's RandomSampler makes a Python list of all indexes, a gigabyte for 36 million frames.
    """

    def __init__(self, length, batch_size, shuffle=False, seed=23, device="cpu"):
        self.length, self.batch_size, self.shuffle, self.seed, self.device = length, batch_size, shuffle, seed, device
        self.epoch = 0

    def set_epoch(self, epoch):
        """As in torch's DistributedSampler: the order depends on the epoch alone, so a resumed run repeats it."""
        self.epoch = epoch

    def __iter__(self):
        if self.shuffle:
            generator = torch.Generator(self.device).manual_seed(self.seed + self.epoch)
            order = torch.randperm(self.length, generator=generator, device=self.device)
        else:
            order = torch.arange(self.length, device=self.device)
        return iter(order.split(self.batch_size)[:len(self)])

    def __len__(self):
        # BatchNorm cannot train on a single frame: where shuffling leaves one over, it waits for the next epoch
        one_over = self.shuffle and self.length % self.batch_size == 1
        return -(-self.length // self.batch_size) - one_over


def make_loader(dataset, batch_size, shuffle=False, seed=23):
    """A DataLoader over whole batches (`batch_size=None`: the sampler gives the indexes of a batch at once).

    It yields float16 (B, 2c+1, 28) and int64 (B,), or the frames alone for test, on the dataset's device. No workers:
    a batch is one gather, which is quicker than passing it between processes.
    """
    return DataLoader(dataset, sampler=Batches(len(dataset), batch_size, shuffle, seed, dataset.frames.device),
                      batch_size=None)


# ---- Masks and warps ---------------------------------------------------------------------------------------

def _stretches(windows, size, param, device):
    """Bool (windows, size): in each a stretch of 0 ... param places, its width and its start uniform."""
    width, start = torch.rand(2, windows, 1, device=device)
    width = (width * (min(param, size) + 1)).long()
    start = (start * (size - width + 1)).long()
    place = torch.arange(size, device=device)
    return (place >= start) & (place < start + width)


def mask_frames(frames, augmentations="Both", freq_mask_param=4, time_mask_param=8, iid_masks=True):
    """SpecAugment's masks: a stretch of coefficients and/or of frames set to zero, drawn anew for every window.

    The width is uniform over 0 ... param and the position over all that fit (Park et al., "SpecAugment", 2019).
    Zero is the mean after normalisation.

    Args:
        frames: float16 or float32 (B, 2c+1, 28); changed in place.
        augmentations: "FreqMask", "TimeMask", "Both" or None.
        iid_masks: False for torchaudio's: one mask for the whole batch, never as wide as param nor over the last row.

    Returns:
        frames.
    """
    for name, axis, param in (("FreqMask", 2, freq_mask_param), ("TimeMask", 1, time_mask_param)):
        if augmentations in (name, "Both") and iid_masks:
            mask = _stretches(len(frames), frames.shape[axis], param, frames.device)
            frames.masked_fill_(mask.unsqueeze(3 - axis), 0)
        elif augmentations in (name, "Both"):
            frames.copy_(torchaudio.functional.mask_along_axis(frames, min(param, frames.shape[axis]), 0.0, axis))
    return frames


def warp_maps(strength, deviations, count=41, bands=40):
    """Linear maps of MFCCs that stretch or squeeze the frequency axis, as a shorter or longer vocal tract does.

    A vocal tract of another length moves all resonances by one factor (Jaitly and Hinton, "Vocal Tract Length
    Perturbation improves speech recognition", 2013). MFCCs are the DCT of log energies in mel bands: go back to the
    bands, read each at factor x its frequency, between two bands linearly, and take the DCT again. All of it is linear.

    Args:
        strength: the factors lie between 1 - strength and 1 + strength.
        deviations: float (28,), by which the coefficients were divided when they were normalised.
        count: of factors, evenly spaced. bands: of the mel scale (HTK's formula, 0 to 8 kHz); the maps hardly depend
            on their number.

    Returns:
        float32 (count, 28, 28), on the device of `deviations`: normalised frames @ map are the warped ones.
    """
    def mel(hertz):
        return 2595 * torch.log10(1 + hertz / 700)

    step = mel(torch.tensor(8000.0)) / (bands + 1)
    centres = 700 * (10 ** (torch.arange(1, bands + 1) * step / 2595) - 1)  # of the bands, in Hz
    factors = torch.linspace(1 - strength, 1 + strength, count)
    position = (mel(factors[:, None] * centres) / step - 1).clamp(0, bands - 1)  # (count, bands), in bands
    read = (1 - (position[:, None] - torch.arange(bands)[:, None]).abs()).clamp(min=0)  # (count, from, to)
    dct = torchaudio.functional.create_dct(COEFFICIENTS, bands, norm="ortho")  # (bands, 28)
    deviations = deviations.clamp(min=deviations.max() / 1000)  # a constant coefficient has none
    return deviations[:, None] * (dct.T @ read @ dct).to(deviations.device) / deviations


def warp_frames(frames, maps):
    """Send each window through one of the maps (see `warp_maps`), drawn at random; in place, returns frames.

    frames: float16 or float32 (B, 2c+1, 28). maps: (n, 28, 28), in the precision of the products.
    """
    which = torch.randint(len(maps), (len(frames),), device=frames.device)
    return frames.copy_(frames.to(maps.dtype) @ maps[which])


class Dropout(torch.nn.Dropout):
    """torch's Dropout, but quicker on a CPU: it saves about a sixth of the whole training step there.

    There, torch draws a random number for each unit; here, four units share the 64 bits of one (p in steps of 1/65536).
    `rate` is the p it was made with, as p may grow over the epochs.
    """

    def __init__(self, p):
        super().__init__(p)
        self.rate = p

    def forward(self, x):
        if not self.training or x.device.type != "cpu":
            return super().forward(x)
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-2**63, None).view(torch.int16)
        keep = bits[:x.numel()].view_as(x) >= round(self.p * 2**16) - 2**15
        return x * keep.to(x.dtype).mul_(1 / (1 - self.p))


# ---- Metrics -----------------------------------------------------------------------------------------------

def confusion_matrix(labels, predictions):
    """Counts, int64 (42, 42): row = true phoneme, column = predicted; both arguments integer (n,)."""
    n = len(PHONEMES)
    return np.bincount(np.asarray(labels, np.int64) * n + np.asarray(predictions), minlength=n * n).reshape(n, n)


def border_distance(labels, starts):
    """Frames from each frame to the nearest phone border of its utterance, int64 (n,); 0 beside the border.

    labels: integer (n,). starts: (utterances + 1,), the first frame of each utterance and n; its ends are borders too.
    """
    labels, starts = np.asarray(labels), np.asarray(starts)
    new = np.concatenate(([True], labels[1:] != labels[:-1]))
    new[starts[:-1]] = True
    borders = np.append(np.flatnonzero(new), len(labels))
    phone = np.searchsorted(borders, np.arange(len(labels)), side="right")
    frame = np.arange(len(labels))
    return np.minimum(frame - borders[phone - 1], borders[phone] - 1 - frame)


def calibration(confidences, correct, bins=10):
    """Is a confidence of 80% right 80% of the time? Equal bins of (0, 1] (Guo et al., "On Calibration", 2017).

    Args:
        confidences: float (n,), probability of the predicted phoneme; correct: bool (n,).

    Returns:
        (mean confidence, accuracy, count: (bins,) each, NaN where a bin is empty; expected calibration error).
    """
    which = np.clip(np.ceil(np.asarray(confidences, np.float64) * bins).astype(int) - 1, 0, bins - 1)
    count = np.bincount(which, minlength=bins)
    with np.errstate(invalid="ignore"):
        confidence = np.bincount(which, confidences, bins) / count
        accuracy = np.bincount(which, correct, bins) / count
    return confidence, accuracy, count, float(np.nansum(np.abs(confidence - accuracy) * count) / count.sum())


# ---- Sequence decoding -------------------------------------------------------------------------------------

def count_transitions(labels, starts):
    """How phonemes follow each other, counted from frame to frame inside the utterances, add-one smoothed.

    Args:
        labels: integer (n,). starts: (utterances + 1,), the first frame of each utterance, and n.

    Returns:
        (log prior of each phoneme, float32 (42,); log probability of the next frame's phoneme, float32 (42, 42):
        row = this frame's, column = the next one's), on the device of `labels`.
    """
    n, labels = len(PHONEMES), labels.long()
    inside = torch.ones(len(labels), dtype=torch.bool, device=labels.device)
    inside[starts[:-1]] = False  # the first frame of an utterance follows nothing
    pairs = (labels[:-1] * n + labels[1:])[inside[1:]]
    counts = torch.bincount(pairs, minlength=n * n).view(n, n).float() + 1
    prior = torch.bincount(labels, minlength=n).float() + 1
    return (prior / prior.sum()).log(), (counts / counts.sum(1, keepdim=True)).log()


def viterbi(scores, transitions, starts):
    """The best path through each utterance: the largest sum of its frames' scores and of its transitions.

    Viterbi's algorithm (Rabiner, "A tutorial on hidden Markov models", 1989, III.B; every start is equally likely), one
    frame of all utterances at a time.

    Args:
        scores: float32 (n, k) for each frame and state. transitions: float32 (k, k), row = from, column = to.
        starts: (utterances + 1,), the first frame of each utterance, and n.

    Returns:
        int64 (n,), the state of each frame, on the device of `scores`.
    """
    device, states = scores.device, scores.shape[1]
    lengths, order = starts.diff().sort(descending=True)
    first = starts[:-1][order].to(device)
    lengths = np.array(lengths.tolist())
    active = (lengths > np.arange(lengths[0])[:, None]).sum(1).tolist()  # how many utterances have a frame t
    best = scores.clone()  # the score of the best path to each state, up to a constant of the frame
    for t in range(1, len(active)):
        frame = first[:active[t]] + t
        total = (best[frame - 1].unsqueeze(2) + transitions).amax(1)
        best[frame] += total - total.amax(1, keepdim=True)  # small numbers stay exact
    # backwards, the state before a known one is the best one for it; behind the last frame there is none
    to_next = torch.cat([transitions.T, torch.zeros(1, states, device=device)])
    state = torch.full((len(first),), states, device=device)
    path = torch.empty(len(scores), dtype=torch.int64, device=device)
    for t in reversed(range(len(active))):
        frame = first[:active[t]] + t
        state[:active[t]] = path[frame] = (best[frame] + to_next[state[:active[t]]]).argmax(1)
    return path


class Decoder:
    """Viterbi over the network's log posteriors, with the training set's transitions.

    A frame's score for a phoneme is its log posterior - `scale` x its log prior; a step's is `weight` x the log
    probability of the transition.

    Example:
        decoder = Decoder(train_data.labels, train_data.starts)
        decoder.choose(log_posteriors, val_data.labels, val_data.starts)
        indexes = decoder(test_log_posteriors, test_data.starts)  # (n, 42) -> int64 (n,)
    """

    def __init__(self, labels, starts, scale=0.0, weight=1.0):
        self.prior, self.transitions = count_transitions(labels, starts)
        self.scale, self.weight = scale, weight

    def __call__(self, log_posteriors, starts):
        device = log_posteriors.device
        return viterbi(log_posteriors - self.scale * self.prior.to(device), self.weight * self.transitions.to(device),
                       starts)

    def choose(self, log_posteriors, labels, starts, frames=100_000):
        """Set `scale` and `weight` to the pair with the most right frames, on the first utterances (some `frames`)."""
        last = min(int(torch.searchsorted(starts, torch.tensor(frames, device=starts.device))), len(starts) - 1)
        starts = starts[:last + 1]
        log_posteriors, labels = log_posteriors[:starts[-1]], labels[:starts[-1]].to(log_posteriors.device)
        right = {}
        for self.scale, self.weight in itertools.product((0, 0.15, 0.3, 0.45), (0.25, 0.5, 0.75, 1, 1.5)):
            right[self.scale, self.weight] = (self(log_posteriors, starts) == labels).sum().item()
        self.scale, self.weight = max(right, key=right.get)


# ---- Checkpoint --------------------------------------------------------------------------------------------

# what may change between two runs in one folder without making the trained weights something else
FREE_KEYS = ("Name", "recipe", "test_warps", "smoothing", "data", "shorten", "wandb", "artifacts", "drive",
             "kaggle_submit", "ablations")


def lock_run(folder):
    """Take the run folder for this process until it ends; repeated calls from the same notebook are fine.

    Raises:
        RunError: another process is running in it.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    lock = FileLock(Path(folder) / ".lock", timeout=0, is_singleton=True)
    try:
        lock.acquire()
    except Timeout:
        raise RunError(f"{folder}: another notebook is training in this folder. Stop it (Kernel > Shut Down), or give "
                       "this run another config['Name'].") from None
    return lock


def _size(state):
    if isinstance(state, torch.Tensor):
        return state.nbytes
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else ()
    return sum(map(_size, parts))


def save_checkpoint(path, state):
    """Write a dict of tensors, numbers and text atomically (torch.save, flushed, moved into place).

    Raises:
        RunError: it could not be written; the previous checkpoint is untouched.
    """
    with replacing(path, size=_size(state)) as temporary, open(temporary, "wb") as file:
        torch.save(state, file)


def load_checkpoint(path, config=None):
    """The dict of `save_checkpoint`, on the CPU; None where there is no such file.

    Args:
        config: where given, the checkpoint's own "config" must agree with it in all but FREE_KEYS, and "epochs" where
            the schedule does not depend on it.

    Raises:
        RunError: the file is damaged or foreign, or was written with another config.
    """
    path = Path(path)
    if not path.exists():
        return None
    try:
        with zipfile.ZipFile(path) as file:  # torch.load does not compare the checksums
            if file.testzip() is not None:
                raise ValueError("checksum")
        state = dict(torch.load(path, map_location="cpu", weights_only=True))
        saved = dict(state["config"])
        if config is not None:
            state["history"]  # best.pt has none: nothing to carry on with
    except Exception as error:  # torch and pickle raise a dozen kinds, none of them readable
        raise RunError(f"{path}: damaged, or not a checkpoint of this notebook ({type(error).__name__}). Restore a "
                       "copy of it, or delete it to start afresh.") from None
    if config is not None:
        planned = config["scheduler"] == "cosineanneal" or config["dropout_ramp"]
        free = FREE_KEYS if planned else (*FREE_KEYS, "epochs")
        differences = [f"{key}: {saved.get(key)!r} there, {config.get(key)!r} now" for key in config
                       if key not in free and saved.get(key) != config.get(key)]
        if differences:
            raise RunError(f"{path}: this run was started with another config:\n  " + "\n  ".join(differences) +
                           "\nSet these back to carry on with it, or choose another config['Name'] for a fresh run."
                           + (" (Cosine annealing and dropout_ramp are planned for a fixed number of epochs.)"
                              if any(line.startswith("epochs") for line in differences) else ""))
    return state


def snapshot(parts):
    """The states of the model, optimizer, scheduler and scaler in a dict of these, and torch's random states."""
    state = {name: part.state_dict() for name, part in parts.items()}
    state["random"] = torch.get_rng_state()
    state["random_cuda"] = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    state["random_mps"] = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
    return state


def restore(state, parts):
    """Put a `snapshot` back, on whatever device the parts are; a RunError where the code has changed since."""
    try:
        for name, part in parts.items():
            if state[name]:  # the scaler's is empty where it was not needed
                part.load_state_dict(state[name])
    except (RuntimeError, ValueError) as error:
        raise RunError(f"the checkpoint is of another {name} than this code makes ({str(error).splitlines()[0]}) "
                       "Choose another config['Name'] for a fresh run.") from None
    torch.set_rng_state(state["random"])
    if torch.cuda.is_available() and len(state["random_cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["random_cuda"])
    if torch.backends.mps.is_available() and state.get("random_mps") is not None:
        torch.mps.set_rng_state(state["random_mps"])


# ---- Submission --------------------------------------------------------------------------------------------

def write_submission(path, predictions):
    """Write Kaggle's CSV: header `id,label`, ids from 0, one row a test frame, labels as phoneme names.

    predictions: phoneme names (n,), in the order of the test partition.
    """
    with replacing(path, size=12 * len(predictions)) as temporary:
        pd.DataFrame({"label": predictions}).to_csv(temporary, index_label="id", lineterminator="\n")


def read_submission(path, rows=None, sample=None):
    """The labels of a CSV as Kaggle takes it, str array (n,).

    Args:
        rows: how many there must be. sample: the competition's sample submission, whose ids must be the same.

    Raises:
        DataError: header, ids, a label or the number of rows is not as expected.
    """
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a CSV file ({error}); expected lines of id,label") from None
    if list(table) != ["id", "label"]:
        raise DataError(f"{path}: the header is {','.join(table)[:200]!r}; expected id,label")
    if not isinstance(table.index, pd.RangeIndex):  # pandas takes the first of three values for an index
        raise DataError(f"{path}: rows with more than two values; expected id,label")
    ids = None
    if sample is not None:
        ids = pd.read_csv(sample, dtype=str, keep_default_na=False).iloc[:, 0]
        rows = len(ids)
    if rows is not None and len(table) != rows:
        raise DataError(f"{path}: {len(table):,} rows; expected {rows:,}, one for each frame of test-clean")
    if ids is None:
        ids = pd.Series(range(len(table))).astype(str)
    for column, good in (("id", table["id"] == ids),
                         ("label", table["label"].isin(PHONEMES))):
        if not good.all():
            i = int(good.argmin())
            raise DataError(f"{path}: line {i + 2} has the {column} {table[column][i]!r}; expected "
                            + (ids[i] if column == "id" else "a phoneme name such as AA or [SIL]"))
    return table["label"].to_numpy(str)


def score_submission(path, answers):
    """Accuracy (0-1 of all frames) of a CSV against the practice corpus's hidden labels, as Kaggle would score it."""
    truth = read_submission(answers)
    return float((read_submission(path, rows=len(truth)) == truth).mean())


KAGGLE_CAUSES = ("The usual causes: the rules are not accepted yet (press Join on "
                 f"kaggle.com/competitions/{COMPETITION}), or the token is missing or has expired: create one in your "
                 "account's settings on kaggle.com, and put it into ~/.kaggle/, the environment (KAGGLE_API_TOKEN) or "
                 "Colab's secrets; never into a cell.")


def kaggle(*arguments):
    """Run the official `kaggle` command with the token that it finds. Returns what it printed.

    Raises:
        RunError: there is no such command, or it failed; it says what to do.
    """
    if shutil.which("kaggle") is None:
        raise RunError("the kaggle command is not installed: pip install kaggle")
    have_keys("KAGGLE_API_TOKEN", "KAGGLE_USERNAME", "KAGGLE_KEY")  # from Colab's secrets
    result = subprocess.run(["kaggle", *map(str, arguments)], capture_output=True, text=True)
    output = (result.stdout + result.stderr).strip()
    if result.returncode or re.search(r"\b40[13]\b", output):
        raise RunError(f"kaggle {' '.join(map(str, arguments))} failed: {output[-300:]}\n{KAGGLE_CAUSES}")
    return output


# ---- Corpora -----------------------------------------------------------------------------------------------
# Synthetic and real speech in the course's layout, for those without the Kaggle data.

def _label_folder(partition):
    return "answers" if partition == "test-clean" else f"{partition}/transcript"


@contextlib.contextmanager
def _new_corpus(root, resume=False):
    """Give a folder ROOT.partial for `_write_utterance`; it becomes `root` if the block succeeds, never before.

    At the end ROOT/answers.csv (`id,label`) gets the phonemes of the test frames, for scoring a submission.

    Args:
        resume: keep what an earlier call that did not come to its end has left there.

    Raises:
        FileExistsError: `root` exists.
    """
    if root.exists():
        raise FileExistsError(f"{root} exists already: delete it to have it made again")
    partial = root.with_name(root.name + ".partial")
    if not resume:
        shutil.rmtree(partial, ignore_errors=True)
    for folder in (*(f"{name}/mfcc" for name in PARTITIONS), *(_label_folder(name) for name in PARTITIONS)):
        (partial / folder).mkdir(parents=True, exist_ok=True)
    yield partial
    for path in partial.rglob(".*.tmp"):  # of a killed call
        path.unlink()
    for name in PARTITIONS:
        if not any((partial / name / "mfcc").iterdir()):
            raise DataError(f"{partial}: no utterances for {name}; expected some in each partition")
    answers = partial / _label_folder("test-clean")
    if not (partial / "answers.csv").exists():
        write_submission(partial / "answers.csv",
                         np.concatenate([np.load(path)[1:-1] for path in sorted(answers.iterdir())]))
    shutil.rmtree(answers)
    partial.rename(root)


def _write_utterance(partial, partition, name, mfcc, labels):
    for folder, array in ((f"{partition}/mfcc", mfcc),
                          (_label_folder(partition), np.array(["[SOS]", *labels, "[EOS]"], "<U5"))):
        with replacing(partial / folder / f"{name}.npy", array.nbytes) as temporary, open(temporary, "wb") as file:
            np.save(file, array)


@contextlib.contextmanager
def _worker_pool(processes):
    """A pool of processes, one a core; they end when this process does."""
    # a spawned process runs the main script again, which would start everything anew; it is shown an empty one
    main, sys.modules["__main__"] = sys.modules["__main__"], types.ModuleType("__main__")
    # spawn, as fork is unsafe once torch has started threads
    pool = ProcessPoolExecutor(processes, get_context("spawn"), _start_worker)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        sys.modules["__main__"] = main


def _start_worker():
    torch.set_num_threads(1)  # every core has its process

    def end_with_parent():  # else a killed notebook's workers would wait for ever
        parent_process().join()
        os._exit(1)
    threading.Thread(target=end_with_parent, daemon=True).start()


@functools.cache
def _feature_transform(rate):
    # LibriSpeech's 16 kHz, windows of 25 ms every 10 ms. Without center, frame t is samples 160 t to
    # 160 t + 511, and the window lies in their middle, at 160 t + 256. log_mels adds 1e-6: no log of zero.
    mfcc = torchaudio.transforms.MFCC(16000, n_mfcc=COEFFICIENTS, log_mels=True, melkwargs={
        "n_fft": 512, "win_length": 400, "hop_length": 160, "n_mels": 40, "center": False})
    return torch.nn.Sequential(torchaudio.transforms.Resample(rate, 16000), mfcc)


def speech_features(audio, rate):
    """MFCCs of an utterance, float32 (T, 28), a frame every 10 ms; audio: float32 (samples,), `rate` in Hz."""
    return np.ascontiguousarray(_feature_transform(rate)(torch.from_numpy(audio)).T.numpy())


def label_frames(starts, phonemes, frames, rate):
    """The phoneme at the centre of each frame's window: a list of `frames` names.

    starts: ascending, where each of `phonemes` starts, in units of 1/rate s; before the first there is silence.
    """
    centres = (np.arange(frames) * 160 + 256) * rate / 16000
    return [["[SIL]", *phonemes][i] for i in np.searchsorted(starts, centres, side="right")]


# ---- Practice corpus: synthetic speech

# Who / did what / where / when: one entry of each makes a sentence (12 x 12 x 12 x 12, our own words).
WHO = """the baker, my youngest cousin, a cheerful farmer, the quiet teacher, both sailors, the village doctor,
    three noisy boys, the shy girl in yellow, her uncle George, an author from Asia, the orchestra, a wise judge"""
DID = """mended a wooden chair, cooked a huge pot of soup, counted eleven white sheep, watched a long television show,
    measured the depth of the pool, fed the hungry goats, pushed the heavy cart, shared a warm blanket,
    hung a bright picture, boiled six fresh eggs, threw the ball too far, carried a basket of oranges"""
WHERE = """in the kitchen, near the old bridge, at the railway station, under a maple tree, behind the red barn,
    across the street, around the corner, above the valley, down by the harbor, beyond the hill, on the tennis court,
    in our backyard"""
WHEN = """before breakfast, on Thursday afternoon, because the bus was late, when the bell rang, just for fun,
    although it was raining, in less than an hour, with great pleasure, as usual, during a power failure,
    while the dog slept, with both eyes shut"""
GRAMMAR = [[" ".join(entry.split()) for entry in entries.split(",")] for entries in (WHO, DID, WHERE, WHEN)]
# The first utterance of each partition has all 39 phones: no class is missing, however small the corpus is.
PANGRAMS = """They knew that noisy young boy very well: he put his hot yellow jacket on the chair, then sang
    both songs about measuring fish, while I paused for a good word with her father. My father thought the
    usual choice was good: wash the huge brown jar, take each thing out, then enjoy a bowl of very hot yams
    with sugar and pears. Our loyal judge took a vision of the yacht shop to church; there both birds sang,
    you gave them all a clean white hat, and I heard my father laugh out loud at the zoo."""
PANGRAMS = [" ".join(sentence.split()) + "." for sentence in PANGRAMS.split(".")[:3]]

# eSpeak NG's mnemonics of American English as ARPAbet. Two phones share the interval half and half: an
# r-coloured vowel is the vowel and R. T is also the flap of "city" (t#) and the glottal stop of "button" (?),
# as in CMUdict; ";" is the glide that links a high vowel to the next vowel and belongs to the first.
ARPABET = """0=AA A:=AA O=AO O2=AO O:=AO a=AE aa=AE V=AH @=AH @2=AH @-=AH a#=AH E=EH I=IH I2=IH I#=IH i=IY
    i:=IY ;=IY U=UH u:=UW 3=ER 3:=ER aI=AY aU=AW eI=EY oU=OW OI=OY A@=AA+R O@=AO+R o@=AO+R e@=EH+R i@3=IH+R
    U@=UH+R i@=IY+AH aI@=AY+AH aI3=AY+ER aU@=AW+ER @L=AH+L n-=N m-=M r-=R b=B tS=CH d=D D=DH f=F g=G h=HH
    dZ=JH k=K l=L m=M n=N N=NG p=P r=R s=S S=SH t=T t2=T t#=T ?=T T=TH v=V w=W j=Y z=Z Z=ZH"""
ARPABET = dict(pair.split("=") for pair in ARPABET.split())

# Variants left out, as people do not sound like that: robots, loud echoes, croaks, chipmunks, mere settings.
UNNATURAL = ("robo", "ricishay", "marco", "alicia", "announcer", "croak", "zac", "tweaky", "mr serious",
             "fast", "kaukovalta")
ESPEAK_RATE = 22050  # Hz


class _Event(ctypes.Structure):  # espeak_EVENT of eSpeak NG's speak_lib.h, its union as the text that we need of it
    _fields_ = [("type", ctypes.c_int), ("unique_identifier", ctypes.c_uint), ("text_position", ctypes.c_int),
                ("length", ctypes.c_int), ("audio_position", ctypes.c_int), ("sample", ctypes.c_int),
                ("user_data", ctypes.c_void_p), ("phoneme", ctypes.c_char * 8)]


_SynthCallback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int,
                                  ctypes.POINTER(_Event))


def _espeak_paths():
    try:
        import espeakng_loader  # here, because only this section needs it
        return espeakng_loader.get_library_path(), espeakng_loader.get_data_path()
    except (ImportError, RuntimeError) as error:
        raise ImportError("the practice corpus needs eSpeak NG: pip install espeakng-loader") from error


def speak(text, voice="", rate=175, pitch=50):
    """Speak a text with eSpeak NG: `voice` is a variant of en-us, `rate` in words a minute, `pitch` 0 to 99.

    Returns (audio, events): int16 samples at 22,050 Hz, and a list of (first sample, mnemonic without stress mark).
    Raises ImportError where eSpeak NG does not load, DataError where it has no such voice.
    """
    library_path, data_path = _espeak_paths()
    if voice and not Path(data_path, "voices", "!v", voice).is_file():  # eSpeak would take its plain voice
        raise DataError(f"eSpeak NG has no voice en-us+{voice}: expected a variant in {data_path}/voices/!v")
    try:
        espeak = ctypes.CDLL(library_path)
    except OSError as error:
        raise ImportError(f"eSpeak NG does not load ({error}): reinstall espeakng-loader with pip") from error
    audio, events = [], []

    @_SynthCallback  # this name keeps the callback alive as long as eSpeak may call it
    def callback(samples, count, event):
        if samples and count > 0:
            audio.append(np.ctypeslib.as_array(samples, (count,)).copy())
        for i in itertools.count():
            if event[i].type == 0:  # espeakEVENT_LIST_TERMINATED
                return 0  # go on
            if event[i].type == 7:  # espeakEVENT_PHONEME
                events.append((event[i].sample, event[i].phoneme.decode().lstrip("',%=")))

    try:
        # 2: AUDIO_OUTPUT_SYNCHRONOUS; 1: PHONEME_EVENTS; 0x8000: DONT_EXIT, return an error instead
        if espeak.espeak_Initialize(2, 0, os.fsencode(data_path), 1 | 0x8000) != ESPEAK_RATE:
            raise ImportError(f"eSpeak NG has no data in {data_path}: reinstall espeakng-loader with pip")
        espeak.espeak_SetSynthCallback(callback)
        if espeak.espeak_SetVoiceByName(f"en-us+{voice}".rstrip("+").encode()) != 0:
            raise DataError("eSpeak NG has no voice en-us")
        espeak.espeak_SetParameter(1, int(rate), 0)  # espeakRATE
        espeak.espeak_SetParameter(3, int(pitch), 0)  # espeakPITCH
        encoded = text.encode()  # flags 1: espeakCHARS_UTF8
        espeak.espeak_Synth(encoded, ctypes.c_size_t(len(encoded) + 1), 0, 0, 0, 1, None, None)
    finally:
        # eSpeak's noise and flutter go on from call to call, in variables that no function resets. Unloading
        # the library does: the sound of an utterance must not depend on what the process said before.
        espeak.espeak_Terminate()
        (_ctypes.FreeLibrary if os.name == "nt" else _ctypes.dlclose)(espeak._handle)
    return np.concatenate(audio), events


def practice_voices():
    """Names of eSpeak NG's variants that sound like people, sorted."""
    variants = sorted(Path(_espeak_paths()[1], "voices", "!v").iterdir())
    # breath and whisper are noise that comes out different each time, even from a freshly loaded library
    return [path.name for path in variants if "\nbreath " not in path.read_text("utf-8", errors="replace")
            and not any(word in path.name.lower() for word in UNNATURAL)]


@functools.lru_cache(maxsize=1)
def _practice_shares(seed):
    """Cuts one shuffle of the voices, and one of the sentence numbers, into a share for each partition."""
    rng = np.random.default_rng(seed)
    voices = rng.permutation(practice_voices()).tolist()
    held_out = len(voices) // 7
    voices = voices[2 * held_out:], voices[:held_out], voices[held_out:2 * held_out]
    return voices, np.array_split(rng.permutation(math.prod(map(len, GRAMMAR))), 3)


def practice_script(partition, index, seed=23):
    """What utterance `index` of `partition` (0 train, 1 dev, 2 test) says, and how; from the arguments only.

    Returns a dict: `text`, `voice`, `rate` (words a minute), `pitch` (0 to 99), `snr` (dB).
    """
    rng = np.random.default_rng((seed, partition, index))
    voices, numbers = _practice_shares(seed)
    number = numbers[partition][index % len(numbers[partition])]
    who, did, where, when = (entries[i] for entries, i in
                             zip(GRAMMAR, np.unravel_index(number, [len(entries) for entries in GRAMMAR])))
    text = f"{when}, {who} {did} {where}." if number % 3 == 0 else f"{who} {did} {where} {when}."
    return {"text": PANGRAMS[partition] if index == 0 else text[0].upper() + text[1:],
            "voice": voices[partition][index % len(voices[partition])],
            "rate": int(rng.integers(140, 200)), "pitch": int(rng.integers(35, 66)),
            "snr": float(rng.uniform(20, 40))}


def frame_labels(events, frames):
    """The phoneme at the centre of each frame's window: a list of `frames` names, from `speak`'s events.

    Raises DataError for a mnemonic without an entry in ARPABET.
    """
    starts, phonemes = [], []
    for (start, mnemonic), (end, _) in zip(events, [*events[1:], events[-1]]):
        if not mnemonic.startswith("_") and mnemonic not in ARPABET:
            raise DataError(f"eSpeak NG's phoneme {mnemonic!r} has no ARPAbet phone; known: {list(ARPABET)}")
        # pauses are _ : _! and so on in eSpeak
        phones = ["[SIL]"] if mnemonic.startswith("_") else ARPABET[mnemonic].split("+")
        starts += [start + i * (end - start) // len(phones) for i in range(len(phones))]
        phonemes += phones
    return label_frames(starts, phonemes, frames, ESPEAK_RATE)


def _make_utterance(partial, partition, index, seed):
    script = practice_script(partition, index, seed)
    samples, events = speak(script["text"], script["voice"], script["rate"], script["pitch"])
    rng = np.random.default_rng((seed, partition, index, 1))
    before, after = rng.integers(ESPEAK_RATE // 8, ESPEAK_RATE // 2, 2)  # of silence; eSpeak alone starts at once
    events = [(start + before, mnemonic) for start, mnemonic in [*events, (len(samples), "_")]]
    audio = np.pad(samples.astype(np.float32) / 2**15, (before, after))
    noise = rng.standard_normal(len(audio), dtype=np.float32)
    audio += noise * np.float32(audio.std() * 10 ** (-script["snr"] / 20))
    mfcc = speech_features(audio, ESPEAK_RATE)
    _write_utterance(partial, PARTITIONS[partition], f"{index:06d}", mfcc, frame_labels(events, len(mfcc)))


def make_practice_corpus(root, utterances=(370, 52, 52), seed=23, processes=None):
    """Make a corpus in the course's layout under `root`, spoken by eSpeak NG: the same seed, the same bytes.

    Partitions share neither sentences nor voices. ROOT/answers.csv (`id,label`) has the test frames' phonemes, for
    scoring a submission. `root` appears when everything is written, never before.

    Args:
        utterances: of train, dev and test, at least 1 each. The defaults make half an hour of speech.
        processes: how many work; None: one a core.

    Raises:
        FileExistsError: `root` exists. DataError: numbers below 1. ImportError: there is no eSpeak NG.
    """
    if len(utterances) != 3 or min(utterances) < 1:
        raise DataError(f"utterances {utterances}: expected three numbers >= 1")
    _espeak_paths()  # fail now rather than in a process
    with _new_corpus(Path(root)) as partial, _worker_pool(processes) as pool:
        jobs = [(partial, p, i, seed) for p in range(3) for i in range(utterances[p])]
        deque(tqdm(in_order(pool, _make_utterance, jobs), total=len(jobs), desc="practice corpus", leave=False,
                   delay=30), maxlen=0)


# ---- LibriSpeech corpus: the course's own recordings, aligned in the open

LIBRISPEECH = "gilkeyio/librispeech-alignments"
LIBRISPEECH_UTTERANCES = 33_862
DEALT = ("train-clean-100", "train-clean-100", "train-clean-100", "dev-clean", "test-clean")
SILENT = ("sil", "sp", "spn", "", None)  # spn: an unknown word


def _alignment_shards(source):
    """[(name, iterable of rows, partitions that its rows go to in turn)], number of rows, bytes of the corpus."""
    datasets = need("datasets")
    need("soundfile")
    from pyarrow import parquet  # comes with datasets
    if not Path(source).exists():
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
            raise DataError(f"{source}: no such file or folder; expected .parquet, or a dataset's name on the hub")
        try:
            streams = {name: datasets.load_dataset(source, split=name.replace("-", "_"), streaming=True)
                       for name in PARTITIONS}
        except Exception as error:  # a dozen kinds, of four libraries
            raise _unreachable(source, error) from error
        shards = [(f"{name}-{i:02d}", _rows(stream.shard(stream.num_shards, i), source), (name,))
                  for name, stream in streams.items() for i in range(stream.num_shards)]
        return shards, LIBRISPEECH_UTTERANCES, 5.6e9
    files = sorted(Path(source).rglob("*.parquet")) if Path(source).is_dir() else [Path(source)]
    shards, total = [], 0
    for number, file in enumerate(files):
        try:
            total += parquet.read_metadata(file).num_rows
            stream = datasets.load_dataset("parquet", data_files=str(file), split="train", streaming=True)
        except Exception as error:
            raise DataError(f"{file}: unreadable parquet ({error}); expected LibriSpeech alignments") from error
        deal = next(((name,) for name in PARTITIONS if file.name.replace("_", "-").startswith(name)), DEALT)
        shards.append((f"{number:03d}-{file.stem}", _rows(stream, file), deal))
    return shards, total, 0.75 * sum(file.stat().st_size for file in files)


def _unreachable(source, error):
    return RunError(f"{source} could not be read from the Hugging Face hub ({type(error).__name__}: "
                    f"{str(error)[:300]}). Check the connection and run again: what is converted is kept.")


def _rows(stream, source):
    """The rows of a stream; what it raises in between becomes a DataError (of a file) or a RunError (of the hub)."""
    try:
        # bytes, as datasets' own decoding needs torchcodec
        stream = stream.select_columns(["id", "audio", "phonemes"])
        yield from stream.cast_column("audio", need("datasets").Audio(decode=False))
    except Exception as error:
        if Path(source).exists():
            raise DataError(f"{source}: {error}; expected LibriSpeech alignments (id, audio, phonemes)") from error
        raise _unreachable(source, error) from error


def _alignment_labels(name, phones, frames):
    """The phonemes of an utterance's frames, a list of `frames` names; a DataError where a phone is unknown."""
    starts, names = [], []
    for phone in sorted(phones, key=lambda phone: phone["start"]):
        symbol = "[SIL]" if phone["phoneme"] in SILENT else phone["phoneme"].rstrip("012")
        if symbol not in PHONEMES[:40]:
            raise DataError(f"{name}: the phone {phone['phoneme']!r} at {phone['start']:.2f} s is unknown; expected "
                            f"{' '.join(PHONEMES[1:40])}, with a stress digit or without, sil, sp or spn")
        if starts and starts[-1] > phone["start"]:
            starts[-1] = phone["start"]  # they overlap: the later one begins where it says
        starts += [phone["start"], phone["end"]]
        names += [symbol, "[SIL]"]  # a gap is silence; without one, the next phone begins at the same time
    return label_frames(starts, names, frames, 1)


def _convert_utterance(partial, partition, row):
    """Write one utterance unless it is there. Returns (id, unknown words in it, why it is left out or None)."""
    name, phones = row["id"], row["phonemes"] or []
    if not re.fullmatch(r"[\w-]+", str(name)):  # it becomes the name of a file
        raise DataError(f"the id {name!r} is no name of a file; expected one such as 103-1240-0000")
    if isinstance(phones, dict):  # a list of structs in older versions of datasets
        phones = [dict(zip(phones, values)) for values in zip(*phones.values())]
    if not phones:
        return name, 0, "no alignment"
    soundfile = need("soundfile")
    try:
        audio, rate = soundfile.read(io.BytesIO(row["audio"]["bytes"]), dtype="float32")
    except (RuntimeError, TypeError) as error:
        raise DataError(f"{name}: the audio cannot be decoded ({error}); expected FLAC") from None
    missing = len(audio) / rate - max(phone["end"] for phone in phones)
    if missing > 0.5:
        return name, 0, f"its phones end {missing:.2f} s before the audio"
    if not (partial / _label_folder(partition) / f"{name}.npy").exists():  # it is written last
        mfcc = speech_features(audio, rate)
        _write_utterance(partial, partition, name, mfcc, _alignment_labels(name, phones, len(mfcc)))
    return name, sum(phone["phoneme"] == "spn" for phone in phones), None


def _convert_shard(partial, name, rows, deal, pool, bar):
    """Convert a shard unless its record is there. Returns the record: numbers of utterances and unknown words, and
    {utterance that is left out: why}."""
    path = partial / "shards" / f"{name}.json"
    if path.exists():
        record = json.loads(path.read_text())
        bar.update(record["utterances"])
        return record
    record = {"utterances": 0, "spn": 0, "left out": {}}
    jobs = ((partial, deal[i % len(deal)], row) for i, row in enumerate(rows))
    for utterance, spn, fault in in_order(pool, _convert_utterance, jobs):
        record["utterances"] += 1
        record["spn"] += spn
        record["left out"] |= {utterance: fault} if fault else {}
        bar.update()
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(record))
    return record


def make_librispeech_corpus(root, source=LIBRISPEECH, processes=None):
    """Make a corpus of real speech in the course's layout under `root` from LibriSpeech with its phones' times.

    Read as a stream: neither the audio nor the dataset is ever whole on the disk or in memory. Killed or cut off, the
    next call goes on with what is missing and ends with the same bytes. ROOT/answers.csv (`id,label`) has the test
    frames' phonemes, ROOT/left-out.txt the utterances that have no alignment, or whose phones end more than half a
    second before the audio.

    Args:
        source: a dataset of the Hugging Face hub, or a local .parquet file or a folder of them, with the columns `id`,
            `audio` {bytes, path} and `phonemes` [{phoneme, start, end}] (ARPAbet, seconds). A file whose name starts
            with train_clean_100, dev_clean or test_clean is of that partition; of another one, three utterances in
            five go to train, one to dev, one to test.
        processes: how many work; None: one a core.

    Raises:
        FileExistsError: `root` exists. RunError: the network or the disk; what is converted is kept in ROOT.partial.
        DataError: damaged parquet or audio, an unknown phoneme, or nothing for one of the partitions.
    """
    root = Path(root)
    with _new_corpus(root, resume=True) as partial:
        shards, total, needed = _alignment_shards(source)
        try:
            with _worker_pool(processes) as pool, tqdm(total=total, desc="LibriSpeech", unit=" utterances",
                                                       leave=False) as bar:
                records = [_convert_shard(partial, *shard, pool, bar) for shard in shards]
        except RunError as error:
            there = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())
            raise RunError(f"{error}\nIn all, {root} needs about {needed / 1e6:,.0f} MB; {there / 1e6:,.0f} MB are "
                           f"there, kept in {partial}. The next start goes on with them.") from error
        left_out = {name: fault for record in records for name, fault in record["left out"].items()}
        with replacing(partial / "left-out.txt") as temporary:
            temporary.write_text("".join(f"{name}: {fault}\n" for name, fault in sorted(left_out.items())))
    print(f"{root}: {sum(record['utterances'] for record in records) - len(left_out):,} utterances; {len(left_out):,} "
          f"left out (their ids are in left-out.txt); {sum(record['spn'] for record in records):,} unknown words (spn) "
          "count as silence")


# ---- Where the data come from ------------------------------------------------------------------------------

def _course_root(folder):
    """The folder itself, or the one in it that has the partitions, as the archive has them in a folder of their own."""
    inside = [path.parent for path in sorted(folder.glob(f"*/{PARTITIONS[0]}"))]
    return folder if (folder / PARTITIONS[0]).is_dir() or not inside else inside[0]


def _kaggle_folder():
    """Where the competition's data lie: beside the notebook, or attached to a notebook of Kaggle's; None if nowhere."""
    for folder in (Path(KAGGLE_FOLDER), KAGGLE / "input" / COMPETITION):
        if folder.is_dir():
            return _course_root(folder)


def _download_from_kaggle():
    kagglehub = need("kagglehub")
    try:  # it resumes a broken download, compares the checksum, unpacks, and knows Colab's secrets
        return _course_root(Path(kagglehub.competition_download(COMPETITION)))
    except Exception as error:  # its own, of the network, of the archive, of the disk
        raise RunError(f"Kaggle's data could not be fetched ({type(error).__name__}: {str(error)[:300]}).\n"
                       f"{KAGGLE_CAUSES} Or the disk is full: unpacking needs about 9 GB. What has been downloaded is "
                       "kept: run again.") from error


def get_data(choice, cache):
    """The data folder that config["data"] asks for. What is not there yet is fetched or made first.

    Args:
        choice: "auto": $HW1P2_DATA, else Kaggle's data where they lie already, else the practice corpus;
            "practice", "kaggle" (downloaded with kagglehub), "librispeech" (see `make_librispeech_corpus`).
        cache: folder for a corpus that is made.

    Raises:
        RunError: it cannot be fetched or written; what is there already is kept for the next start.
    """
    if choice == "auto":
        if os.environ.get("HW1P2_DATA"):
            return Path(os.environ["HW1P2_DATA"])
        choice = "kaggle" if _kaggle_folder() else "practice"
    if choice == "kaggle":
        return _kaggle_folder() or _download_from_kaggle()
    name, make = {"practice": ("practice-corpus", make_practice_corpus),
                  "librispeech": ("librispeech", make_librispeech_corpus)}[choice]
    root = Path(cache) / name
    if not root.exists():
        with alone(root):  # of two notebooks that ask at once, the second one waits
            if not root.exists():
                print(f"{root} is not there yet: making it")
                make(root)
    return root
