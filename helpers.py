"""The module behind the notebook hw1p2_starter.ipynb: everything that is not the lesson itself.

The sections stand in the order in which the data flow. A folder of .npy files becomes one array,
the array becomes windows, and the windows become batches:

    # root: a folder in the course's layout
    data = AudioDataset(root, "train-clean-100", context=50)
    maps = warp_maps(0.2, data)
    for frames, phonemes in make_loader(data, 2048, shuffle=True):
        # frames: float16 (2048, 101, 28), phonemes: int64 (2048,)
        warp_frames(frames, maps)  # in place
        mask_frames(frames, "FreqMask")  # in place

Sections, and the functions to start with:

    Errors and files         DataError, RunError, atomic_write, one_process_at_a_time
    Config                   check_config, make_run_config
    Code                     code_of, code_differences
    Device and precision     pick_device, pick_precision
    Reading                  read_partition
    Windows and loaders      AudioDataset, make_loader
    Augmentation             mask_frames, warp_maps, warp_frames
    Network                  Dropout, scale_dropout, print_layers
    Loss and schedule        loss_weight, check_schedule
    Metrics                  confusion_matrix, boundary_distance, calibration
    Figures                  plot_utterance, plot_history, plot_confusion
    Decoding                 viterbi, Decoder
    Checkpoint               save_checkpoint, load_checkpoint, start_or_resume, restore
    Folders and runs         runs_folder, cache_folder, load_secrets, read_runs, compare_runs
    Google Drive             open_drive, copy_to_drive, restore_from_drive
    wandb                    start_wandb, log_history, finish_wandb
    Submission               write_submission, read_submission, submit
    Corpora                  speech_features, label_frames
    Practice corpus          speak, make_practice_corpus
    LibriSpeech              make_librispeech_corpus
    Where the data are       get_data
"""

import _ctypes
import ast
import contextlib
import copy
import csv
import ctypes
import difflib
import functools
import hashlib
import importlib.util
import inspect
import io
import itertools
import json
import linecache
import math
import os
import platform
import re
import secrets
import shlex
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import textwrap
import threading
import time
import warnings
import weakref
import zipfile
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import safetensors.torch
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

# ---- Constants -----------------------------------------------------------------------------------

PHONEMES = (
    "[SIL] AA AE AH AO AW AY B CH D DH EH ER EY F G HH IH IY JH K L M N NG OW OY P R S SH T TH "
    "UH UW V W Y Z ZH [SOS] [EOS]"
).split()

# The phonemes by manner of articulation, in the order of the picture of the confusion matrix.
MANNERS = {
    "silence": ["[SIL]"],
    "vowels": "IY IH EH AE AH ER UW UH AO AA OW EY AY OY AW".split(),
    "glides, liquids": "Y W R L".split(),
    "nasals": "M N NG".split(),
    "stops": "P B T D K G".split(),
    "affricates": "CH JH".split(),
    "fricatives": "F V TH DH S Z SH ZH HH".split(),
}

PARTITIONS = ("train-clean-100", "dev-clean", "test-clean")
KINDS = ("mfcc", "transcript")  # the folders of a partition; the test partition has only the first
OLD_SPELLING = {"SIL": "[SIL]", "<sos>": "[SOS]", "<eos>": "[EOS]"}  # in the editions of 2022
LIFTER = 22  # HTK's default: coefficient i is multiplied by 1 + 11 sin(pi i / 22)

# A dataset on the Hugging Face hub: 33,861 utterances, 7 GB, which become 5.3 GB of MFCCs.
LIBRISPEECH = "gilkeyio/librispeech-alignments"
LIBRISPEECH_REVISION = "0daa1eb43dda38ee6ce752e785555380e5628f5c"  # of 2023-11-22

PRACTICE = "practice-corpus"  # the name of its folder

# The course's competitions on Kaggle, the default first, each with the name of the folder that its
# data come in (None: not known).
EDITIONS = {
    "11785-spring-25-hw-1-p-2": "11785-s25-hw1p2",
    "11785-hw1p2-f24": None,
    "11785-hw-1-p-2-fall-2025-main": "11785-f25-hw1p2",
    "hw-1-p-2-spring-2026-student-competition": "11785-spring-2026-hw1p2",
    "hw-1-p-2-fall-2026-student-competition": None,
    "hw-1-p-2-fall-2026-slack-competition": None,
}

KAGGLE = Path("/kaggle")  # in Kaggle's notebooks: input/ is what was attached, working/ is kept


# ---- Errors and files ----------------------------------------------------------------------------


class DataError(ValueError):
    """Bad input data. The message names the file, what is wrong with it, and what was expected."""


class RunError(RuntimeError):
    """A run that cannot go on. The message says what happened and what to do."""


def path_from_environment(name):
    """The path in an environment variable, ~ and $VARIABLES expanded; None if unset or empty.

    Raises a RunError if it begins with the home directory of an unknown user.
    """
    value = os.environ.get(name, "").strip(" \t\r\n'\"")  # %env and .env files keep the quotes
    if not value:
        return None
    path = os.path.expanduser(os.path.expandvars(value))
    if path.startswith("~"):  # expanduser has not found the user
        user = path.split(os.sep)[0]
        raise RunError(f"{name} is {value}: there is no home directory for {user}")
    return Path(path)


def is_clutter(name):
    """Is this the name of a hidden file, a backup, or what a Mac adds to archives?"""
    return name.startswith((".", "~")) or name.endswith("~") or name == "__MACOSX"


def find_files(folder, *patterns):
    """Sorted paths below a folder that match one of these patterns of `Path.glob`; no clutter."""
    folder = Path(folder)
    found = []
    for pattern in patterns:
        for path in folder.glob(pattern):
            parts = path.relative_to(folder).parts
            if not any(is_clutter(part) for part in parts):
                found.append(path)
    return sorted(found)


def shorten(text, width=200):
    """A foreign text, such as an error message, on one line of at most `width` characters."""
    return textwrap.shorten(str(text), width, placeholder=" ...")


def first_ten(lines, more="more"):
    """The first ten of these lines; if there are others, one more line says how many."""
    others = len(lines) - 10
    if others <= 0:
        return lines
    return [*lines[:10], f"... and {others:,} {more}"]


def last_words(text, width=300):
    """The end of a foreign text: at most `width` characters, beginning with a whole word."""
    if len(text) <= width:
        return text
    return re.sub(r"^\S+\s+", "", text[-width:])


def internet_hint():
    """A hint for messages about failed downloads: Kaggle has a switch; elsewhere it is empty."""
    return " On Kaggle, Settings > Internet must be on." if KAGGLE.is_dir() else ""


def _module_name(package):
    """The module's name for pip's name of a package: torchsummaryX for "torchsummaryX==1.1.0"."""
    return package.split("=")[0].replace("-", "_")


def _can_import(name):
    """Is there a module of this name? A mere folder of that name is none: it has no origin."""
    spec = importlib.util.find_spec(name)
    return spec is not None and spec.origin is not None


def install(*packages):
    """Install those of these packages that cannot be imported yet, with pip.

    packages: as for pip, such as "torchsummaryX==1.1.0".
    Raises a RunError if pip fails.
    """
    missing = [package for package in packages if not _can_import(_module_name(package))]
    if not missing:
        return
    print("installing", *missing)
    command = [sys.executable, "-m", "pip", "install", "--quiet", *missing]
    pip = subprocess.run(command, capture_output=True, text=True)
    if pip.returncode != 0:
        raise RunError(
            f"pip could not install {' '.join(missing)}: {last_words(pip.stderr)}\n"
            f"Is there a connection?{internet_hint()}"
        )
    importlib.invalidate_caches()
    for package in missing:
        # a mere folder of that name may have been imported before
        sys.modules.pop(_module_name(package), None)


@contextlib.contextmanager
def atomic_write(path, size):
    """Give a temporary path beside `path`, and move it into place if the block succeeds.

    A reader sees the old file or the new one, never a part of it. size: about how many bytes the
    file will have, for the message.
    Raises a RunError if it cannot be written, which says how much space is needed and free.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, safetensors.SafetensorError) as error:
        free = shutil.disk_usage(path.parent).free if path.parent.exists() else 0
        raise RunError(
            f"{path} could not be written ({error}): {size / 1e6:.1f} MB are needed there, "
            f"{free / 1e6:.1f} MB are free. What was there before is unchanged. Free some space "
            "and run again."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def check_writable(folder):
    """Make a folder if need be, and return it. Raises a RunError if it cannot be written to."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise RunError(
            f"{folder} cannot be written to ({error}). Set the environment variable "
            "HW1P2_RUNS to a folder that can, and restart the kernel."
        ) from error
    return folder


class _LockFile(io.FileIO):
    """A file that is closed without a ResourceWarning when it is garbage-collected."""

    def __del__(self):
        self.close()


def _lock(file):
    """Lock an open file. BlockingIOError or PermissionError: another process holds the lock."""
    if os.name == "nt":
        import msvcrt

        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def try_to_lock(path, say=print):
    """An open file at `path` that this process has locked; None if another one holds the lock.

    The lock is released when the file is closed or the process ends, even if it is killed. On a
    file system without locks a warning goes to `say`, and the file is returned all the same.
    Raises a RunError if the file cannot be created.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _LockFile(path, "a")
    except OSError as error:
        raise RunError(f"{path.parent} cannot be written to: {error}") from error
    try:
        _lock(file)
    except (BlockingIOError, PermissionError):
        file.close()
        return None
    except OSError as error:
        say(
            f"{path} cannot be locked on this file system ({error}): going on without a lock. "
            "Do not start a second notebook that writes there at the same time."
        )
    return file


@contextlib.contextmanager
def one_process_at_a_time(path):
    """Let one process at a time into the block, which makes the file or folder `path`."""
    lock_path = path.with_name(f".{path.name}.lock")
    lock = try_to_lock(lock_path)
    if lock is None:
        print(f"another notebook is making {path}: waiting for it")
    while lock is None:
        time.sleep(0.1)
        lock = try_to_lock(lock_path)
    with lock:
        yield


def map_in_threads(function, jobs):
    """Yield function(job) for each job, in order.

    16 threads work ahead, by 64 jobs at most. They end with the generator.
    """
    pool = ThreadPoolExecutor(16)
    try:
        futures = (pool.submit(function, job) for job in jobs)
        pending = deque(itertools.islice(futures, 64))
        while pending:
            yield pending.popleft().result()
            pending.extend(itertools.islice(futures, 1))
    finally:
        pool.shutdown(cancel_futures=True)


# ---- Config --------------------------------------------------------------------------------------

# The keys of the notebook's config: key: (its default, what it may be). That is
#   (type, lowest, highest), perhaps with other values behind them;
#   a list of values, with str among them for the name of a run;
#   str for the name of a folder;
#   None for the name of a part: an entry in one of the notebook's tables (see its `options`).
CONFIG_KEYS = {
    "Name": ("pencil", str),
    "subset": (1, (float, 1e-9, 1)),
    "context": (50, (int, 0, 1000)),
    "archetype": ("pencil", None),
    "activations": ("leakyrelu", None),
    "batch_norm": (True, [True, False]),
    "batchnorm_alternate": (False, [True, False]),
    "num_layers": (7, (int, 0, 8)),
    "dropout": (0.225, (float, 0, 0.99)),
    "dropout_alternate": (True, [True, False]),
    "weight_initialization": ("kaiming_uniform", None),
    "optimizers": ("adamw", None),
    "learning_rate": (0.001, (float, 0, 100)),
    "weight_decay": (0.001, (float, 0, 100)),
    "scheduler": ("cosineanneal", None),
    "epochs": (150, (int, 1, 10**6)),
    "batch_size": (2048, (int, 2, 10**7)),
    "augmentations": ("FreqMask", None),
    "freq_mask_param": (4, (int, 0, 28)),
    "time_mask_param": (8, (int, 0, 2001)),
    # added to the course's keys
    "loss": ("crossentropy", None),
    "seed": (23, (int, 0, 2**32 - 1)),
    "start_from": (None, [None, str]),
    "recipe": ("best", ["best", "original"]),
    "warp": (0.2, (float, 0, 0.5)),
    "dropout_scale": ("auto", (float, 0, 4, "auto")),
    "lr_scale": ("auto", (float, 0, 100, "auto")),
    "test_warps": (5, (int, 1, 99)),
    "smoothing": (False, [True, False]),
    "data": ("auto", ["auto", "practice", "kaggle", "librispeech"]),
    "competition": ("11785-spring-25-hw-1-p-2", str),
    "shorten": (True, [True, False]),
    "wandb": ("auto", ["auto", "online", "offline", "disabled"]),
    "artifacts": (True, [True, False]),
    "drive": (False, [True, False]),
    "kaggle_submit": (False, [True, False]),
    "ablations": (False, [True, False]),
}
DEFAULTS = {key: default for key, (default, _) in CONFIG_KEYS.items()}
OPTIONS = {key: allowed for key, (_, allowed) in CONFIG_KEYS.items()}

# What config["recipe"] = "original" sets: the course's training, nothing else.
ORIGINAL = {"warp": 0, "dropout_scale": 1, "lr_scale": 1, "test_warps": 1}
# What suits the practice corpus, in place of the defaults.
SHORTER = {"epochs": 3, "batch_size": 512}
# How runs were trained before these keys existed. (For a key of your own: 0, False or None.)
BEFORE = {**ORIGINAL, "loss": "crossentropy", "seed": 23, "start_from": None}
# (key, value): the values of other keys that this value sets.
SWITCHES = {("recipe", "original"): ORIGINAL, ("shorten", True): SHORTER}


def _is_name(value):
    """Can this text name a folder beside runs/cache, on every system?"""
    return (
        isinstance(value, str)
        and value.isprintable()
        and not set(value) & set('/\\<>:"|?*[]')
        and value == value.strip(" .") != ""
        and len(value.encode()) <= 200
        and value.casefold() != "cache"
    )


def _is_one_of(value, allowed):
    """Is the value among the allowed ones, and of the same type? True is not 1."""
    return any(type(value) is type(option) and value == option for option in allowed)


def _plain_number(value):
    """Python's number in place of one of numpy's or a tensor of one element; others as they are."""
    return value.item() if getattr(value, "ndim", None) == 0 else value


def _with_our_capitals(value, allowed):
    """The allowed value that this text spells in other capitals: "GELU" is "gelu", "None" None."""
    if isinstance(allowed, tuple):
        allowed = allowed[3:]  # behind (type, lowest, highest)
    if not isinstance(value, str) or not isinstance(allowed, (list, tuple)) or value in allowed:
        return value
    for option in allowed:
        if str(option).casefold() == value.casefold():
            return option
    return value


def _fault(value, allowed):
    """What a value should be instead, as text; None where it is allowed (see CONFIG_KEYS)."""
    if allowed is None:
        return None
    if allowed is str:
        hint = (
            '1 to 200 characters (bytes in UTF-8) that can name a folder: none of / \\ < > : " | ? '
            "* [ ], no dot or blank at the ends; and not 'cache'"
        )
        return None if _is_name(value) else hint
    if isinstance(allowed, list):
        if _is_one_of(value, allowed):
            return None
        if str in allowed and isinstance(value, str) and all(map(_is_name, value.split("/"))):
            return None  # the name of a run; that of a variant has slashes
        return ", ".join("the name of a run" if each is str else repr(each) for each in allowed)
    kind, lowest, highest, *others = allowed
    is_number = isinstance(value, (int, kind)) and not isinstance(value, bool)
    if is_number and lowest <= value <= highest or _is_one_of(value, others):
        return None
    kind = "a whole number" if kind is int else "a number"
    return " or ".join([f"{lowest} to {highest} ({kind})", *map(repr, others)])


def check_config(config, options, defaults=None):
    """A checked copy of a config; numpy's numbers and one-element tensors in it become Python's.

    options: what each key may be, as in CONFIG_KEYS. A text may have other capitals than the
    option: "GELU" becomes "gelu", and "None" None.
    defaults: the values of missing keys; without it, a missing key is a fault.
    Raises a ValueError that lists every unknown or missing key and every value not allowed.

    Example:
        check_config({"epochs": np.int64(3)}, {"epochs": (int, 1, 10)})  # {"epochs": 3}
    """
    checked, faults = {}, []
    for key, value in {**(defaults or {}), **config}.items():
        if key not in options:
            faults.append(f"unknown key {key!r}; the keys are {', '.join(options)}")
            continue
        value = _with_our_capitals(_plain_number(value), options[key])
        expected = _fault(value, options[key])
        if expected is not None:
            faults.append(f"{key!r} is {value!r}; allowed: {expected}")
        checked[key] = value
    faults += [f"the key {key!r} is missing" for key in options if key not in checked]
    if faults:
        raise ValueError("config: " + "\n        ".join(faults))
    return checked


def make_run_config(config, options, changes=()):
    """The config as a run uses it, and the folder of its data (see `get_data`).

    config: the notebook's; what is missing has its default. options: see `check_config`.
    changes: a dict, such as a variant's; its values win over what follows:
    `recipe` "original" sets the values of ORIGINAL, and with `shorten`, on the practice corpus,
    SHORTER replaces the defaults.
    Raises a ValueError for a bad config, and what `get_data` raises.
    """
    config = check_config({**config, **dict(changes)}, options, DEFAULTS)
    if config["recipe"] == "original":
        config |= {key: value for key, value in ORIGINAL.items() if key not in changes}
        if any(config[key] != value for key, value in ORIGINAL.items()):
            config["recipe"] = "best"  # it has values of its own now, which are to stay
    data_folder = get_data(config["data"], cache_folder(), config["competition"])
    if config["shorten"] and data_folder.name == PRACTICE:
        shortened = [key for key in SHORTER if config[key] == DEFAULTS[key]]
        config |= {key: SHORTER[key] for key in shortened if key not in changes}
        if any(key in changes for key in shortened):
            config["shorten"] = False  # these values are the user's, and are to stay
    return config, data_folder


def update_switches(run, run_config):
    """Let a trained run follow what the config says now of the prediction and the submission."""
    for key in ("test_warps", "smoothing", "competition", "artifacts", "kaggle_submit"):
        run.config[key] = run_config[key]


def variant_name(changes):
    """The name of a variant: its changes to the config, a dict, as text that can name a folder."""
    text = ",".join(f"{key}={value}" for key, value in sorted(changes.items())) or "base"
    name = re.sub(r"[^\w.,=+-]", "_", text)
    if _is_name(name):
        return name
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]  # too long: the same each time
    return f"{name[:40].strip('.')}-{digest}"


# ---- Code: what a run was made by ----------------------------------------------------------------
#
# A run keeps, beside its weights, the code that made them: texts by name, from `code_of`. When it
# is opened again, these are compared with the texts of the code that is there now. For example:
#
#     "train":              "def train(run):\n    for ..."               the source of a function
#     "mask_frames":        "def mask_frames(frames, ..."               and of one that it calls
#     "LIFTER":             "22"                                        a constant that one uses
#     "MyLoss.forward":     "def forward(self, logits, phonemes): ..."  a method of the user's class
#     "criterion":          "torch.nn.modules.loss.CrossEntropyLoss"    a library's class: its name
#     "criterion.weight":   "torch.float32 (3,): 1 2 1"                 what an object of it holds
#     "optimizer":          "torch.optim.sgd.SGD"                       a functools.partial
#     "optimizer, given":   "momentum=0.9"                              and its arguments

# Arguments of torch's optimizers that do not change what they compute.
FOR_SPEED = ("fused", "foreach", "capturable")


# Whose code is it, and what is its source?


def _read_source():
    """The text of this file; None if it cannot be read."""
    with contextlib.suppress(OSError):
        return Path(__file__).read_text("utf-8")


_SOURCE = _read_source() or ""  # as it was imported


def edited_hint():
    """A line for the user if this file was edited after it was imported; else an empty text."""
    if _read_source() in (_SOURCE, None):
        return ""
    return (
        "helpers.py was edited after it was imported: restart the kernel, or the edit has no effect"
    )


# its folders; not asked for each time, because that takes long
_STANDARD_LIBRARY = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib")]


def _is_ours(thing):
    """Is this function or class from the notebook, this file or another one of the user's?"""
    if inspect.isclass(thing):
        module = sys.modules.get(thing.__module__)
        path = getattr(module, "__file__", None)
        if path is None:  # it is from a notebook, or built into Python
            return module is None or module.__name__ == "__main__"
    else:
        path = thing.__code__.co_filename
    path = Path(path)
    if "site-packages" in path.parts or "dist-packages" in path.parts:
        return False
    return not any(path.is_relative_to(folder) for folder in _STANDARD_LIBRARY)


@functools.lru_cache(100)
def _sources_in(text):
    """{(first line, name): source} of all functions and lambdas in the text of a file or cell.

    Lambdas that begin in the same line share an entry.
    """
    lines = text.splitlines(keepends=True)
    sources = {}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            first = min(each.lineno for each in [node, *node.decorator_list])
            source = "".join(lines[first - 1 : node.end_lineno])
            sources[first, node.name] = textwrap.dedent(source)
        elif isinstance(node, ast.Lambda):
            key = node.lineno, "<lambda>"
            source = f"({ast.get_source_segment(text, node)})\n"
            sources[key] = sources.get(key, "") + source
    return sources


def _source(function):
    """The source of a function or lambda; None if there is none, as in a plain Python prompt."""
    code = function.__code__
    if code.co_filename == __file__:
        text = _SOURCE  # the file may have been edited since
    else:
        text = "".join(linecache.getlines(code.co_filename, function.__globals__))
    try:
        return _sources_in(text).get((code.co_firstlineno, code.co_name))
    except SyntaxError:
        return None


# What is a value made of?


def _unwrapped(value):
    """The function inside a decorated one or a method; other values as they are."""
    if callable(value):
        value = inspect.unwrap(value)
    if inspect.ismethod(value):
        value = value.__func__
    return value


def _is_simple(value):
    """Is it a number, a text, None, or a list or tuple of these?"""
    parts = value if isinstance(value, (tuple, list)) else [value]
    return all(isinstance(part, (bool, int, float, str, type(None))) for part in parts)


def _used_by(function, source):
    """{name: value} of our functions and classes, and of the constants, that a function uses.

    Constants are simple values whose names are in CAPITALS or belong to an enclosing function.
    """
    enclosing = function.__code__.co_freevars
    known = dict(function.__globals__)
    for name, cell in zip(enclosing, function.__closure__ or ()):
        with contextlib.suppress(ValueError):  # it has no value yet
            known[name] = cell.cell_contents

    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name) and node.id in known:  # mask_frames
            found.append((node.id, known[node.id]))
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = known.get(node.value.id)
            if inspect.ismodule(module):  # helpers.mask_frames
                found.append((node.attr, getattr(module, node.attr, None)))

    used = {}
    for name, value in found:
        value = _unwrapped(value)
        is_code = inspect.isfunction(value) or inspect.isclass(value)
        if is_code and _is_ours(value):
            used[name] = value
        elif _is_simple(value) and (name.isupper() or name in enclosing):
            used[name] = value
    return used


class _Description:
    """Collects texts that say what values are, and what they are made of.

    Attributes: `texts`, {name: text}; `unfinished`, the ids of the values of which the one that is
    being described is a part: a value that is a part of itself ends there.
    """

    def __init__(self):
        self.texts = {}
        self.unfinished = []

    def add(self, name, value):
        """Describe a value under its name, and its parts under names of their own."""
        value = _unwrapped(value)
        if _is_simple(value):
            self.texts[name] = repr(value)
        elif id(value) not in self.unfinished:
            self.unfinished.append(id(value))
            self._add_compound(name, value)
            self.unfinished.pop()

    def _add_compound(self, name, value):
        if isinstance(value, functools.partial):
            self._add_partial(name, value)
        elif inspect.isfunction(value) and _is_ours(value):
            self._add_function(name, value)
        elif inspect.isfunction(value) or inspect.isbuiltin(value):
            self.texts.setdefault(name, f"{value.__module__}.{value.__qualname__}")
        elif inspect.isclass(value):
            self._add_class(name, value)
        elif isinstance(value, torch.Tensor):
            numbers = [f"{number:.4g}" for number in value.flatten()[:1000].tolist()]
            self.texts[name] = f"{value.dtype} {tuple(value.shape)}: {' '.join(numbers)}"
        elif isinstance(value, dict):
            self._add_items(name, value, value.items())
        elif isinstance(value, (list, tuple)):
            self._add_items(name, value, enumerate(value))
        else:
            self._add_object(name, value)

    def _add_items(self, name, container, items):
        self.texts[name] = type(container).__name__
        for key, value in items:
            self.add(f"{name}.{key}", value)

    def _add_partial(self, name, partial):
        self.add(name, partial.func)
        arguments = {**dict(enumerate(partial.args)), **partial.keywords}
        simple = []
        for key, value in arguments.items():
            if key in FOR_SPEED:
                continue
            if _is_simple(value):
                simple.append(f"{key}={value!r}")
            else:
                self.add(f"{name}, {key}", value)
        self.texts[f"{name}, given"] = ", ".join(simple) or "nothing"

    def _add_function(self, name, function):
        """A function of ours: its source, and all that it uses."""
        is_lambda = function.__name__ == "<lambda>"
        key = name if is_lambda else function.__qualname__
        if key != name:
            self.texts.setdefault(name, key)
        source = None if key in self.texts else _source(function)
        if source is None:
            return
        self.texts[key] = source
        for used, value in _used_by(function, source).items():
            is_enclosed = used in function.__code__.co_freevars
            self.add(f"{key}, {used}" if is_enclosed else used, value)

    def _add_class(self, name, kind):
        """A class: its name, and the functions in it and in those of its bases that are ours."""
        self.texts.setdefault(name, f"{kind.__module__}.{kind.__qualname__}")
        for base in kind.__mro__:
            if not _is_ours(base):
                continue
            for member in vars(base).values():
                if isinstance(member, (staticmethod, classmethod)):
                    member = member.__func__
                elif isinstance(member, property):
                    member = member.fget
                if inspect.isfunction(member):
                    self.add(member.__qualname__, member)

    def _add_object(self, name, value):
        """An object: its class, and what it holds, if that is simple, a tensor or a function."""
        self.add(name, type(value))
        attributes = getattr(value, "__dict__", {})
        held = {key: part for key, part in attributes.items() if not key.startswith("_")}
        if isinstance(value, torch.nn.Module):
            held.pop("training")
            held.update(value.named_parameters())
            held.update(value.named_buffers())
        for key, part in held.items():
            if _is_simple(part) or isinstance(part, torch.Tensor) or inspect.isfunction(part):
                self.add(f"{name}.{key}", part)


def code_of(parts):
    """What these parts do, as {name: text}: kept with a run, compared by `code_differences`.

    parts: {name: a function, class or object, or a list, tuple or dict of such}. Of functions and
    classes of the notebook and of this file it is the source, also of all that they use; of others
    the name, and what they hold. A function without a source has no text.
    """
    description = _Description()
    for name, part in parts.items():
        description.add(name, part)
    return description.texts


def _settings_of(layer):
    """What a layer prints of itself, "1600, eps=1e-05", as "1600" and {"eps": "1e-05"}."""
    unnamed = []
    named = {}
    for setting in re.split(r", (?=\w+=)", layer.extra_repr()):
        if re.match(r"\w+=", setting):
            key, value = setting.split("=", 1)
            named[key] = value
        else:
            unnamed.append(setting)
    return ", ".join(unnamed), named


def code_of_network(model):
    """The same for a network: its layers, and the source of those that are the user's own."""
    description = _Description()
    texts = description.texts
    for name, layer in model.named_modules():
        # torch.compile puts a layer into another one, under the name _orig_mod: that one counts
        if name.split(".")[-1] == "_orig_mod":
            continue
        layer = getattr(layer, "_orig_mod", layer)
        name = f"layer {name.replace('_orig_mod.', '')}" if name else "network"
        # a text for each setting, as other versions of torch print more or fewer of them
        unnamed, named = _settings_of(layer)
        texts[name] = f"{type(layer).__name__}({unnamed})"
        for key, value in named.items():
            texts[f"{name}, {key}"] = value
        if _is_ours(type(layer)):
            description.add(type(layer).__qualname__, type(layer))
    return texts


# Is it the same as before?


class _RemoveExtras(ast.NodeTransformer):
    """Removes docstrings and `torch.compile` from a syntax tree."""

    def visit_FunctionDef(self, node):
        self.generic_visit(node)
        if ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
        node.decorator_list = [
            decorator
            for decorator in node.decorator_list
            if "torch.compile" not in ast.unparse(decorator)
        ]
        return node

    visit_ClassDef = visit_FunctionDef

    def visit_Call(self, node):
        self.generic_visit(node)
        if ast.unparse(node.func) == "torch.compile" and node.args:
            return node.args[0]
        return node


def _essence(source):
    """A source without its comments, layout, docstrings and `torch.compile`, as text."""
    return ast.dump(_RemoveExtras().visit(ast.parse(source)))


def _is_same_code(one, other):
    """Do two sources compute the same, as far as their `_essence` tells?"""
    if one == other:
        return True
    try:  # both are parsed now, as the syntax trees differ from one version of Python to another
        return _essence(one) == _essence(other)
    except SyntaxError:  # a text that is no source
        return False


def _lines_that_differ(old, new):
    """Lines of two texts, "-" before those of the old one and "+" before those of the new one."""
    lines = difflib.unified_diff(old.splitlines(), new.splitlines(), n=0, lineterm="")
    without_header = list(lines)[2:]
    return [line for line in without_header if not line.startswith("@@")]


def code_differences(saved, now):
    """Lines that say what differs between two results of `code_of`.

    What only one of them has is no difference.
    """
    lines = []
    for name, old in saved.items():
        new = now.get(name, old)
        if _is_same_code(old, new):
            continue
        if "\n" in old.strip() or "\n" in new.strip():
            lines.append(f"`{name}` has changed; - there, + now:")
            changes = first_ten(_lines_that_differ(old, new), "more lines")
            lines += [f"  {line}" for line in changes]
        else:
            lines.append(f"{name}: {old} there, {new} now")
    return lines


# ---- Device and precision ------------------------------------------------------------------------


def pick_device():
    """(device, its name): the device is "cuda", "mps" or "cpu".

    Raises a RunError if there is a GPU that this torch cannot use.
    """
    if not torch.cuda.is_available():
        if torch.backends.mps.is_available():
            return "mps", f"{platform.machine()} Apple GPU"
        return "cpu", f"{platform.machine()} CPU, {os.cpu_count()} cores"
    name = torch.cuda.get_device_name()
    try:
        # a GPU that is too old is "available", and fails at its first operation
        torch.ones(8, device="cuda").sum().item()
    except RuntimeError as error:
        raise RunError(
            f"torch {torch.__version__} cannot use this GPU, {name} "
            f"({str(error).splitlines()[0]}). Choose another one: on Kaggle Settings > "
            "Accelerator > GPU T4 x2, on Colab Runtime > Change runtime type > T4."
        ) from None
    count = torch.cuda.device_count()
    if count > 1:
        name += f" (the first of {count}: a run uses one)"
    return "cuda", name


def pick_precision(device, saved=None):
    """The dtype of the matrix products: the fastest one, or that of a resumed run if possible.

    float16 needs a gradient scaler; bfloat16 has the range of float32 and needs none. A CPU gets
    bfloat16 only if it has instructions for such products (AVX-512 BF16 or AMX): others emulate
    both, which is slow.
    saved: "float32", "bfloat16" or "float16", from a checkpoint of the run.
    """
    if device == "cuda":
        supported = [torch.float16]
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device == "cpu":
        supported = [torch.float32]
        known = hasattr(torch.cpu, "get_capabilities")  # older versions of torch cannot tell
        capabilities = torch.cpu.get_capabilities() if known else {}
        has_bfloat16 = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    else:
        supported = [torch.float32]
        has_bfloat16 = False
    if has_bfloat16:
        supported.insert(0, torch.bfloat16)

    for dtype in supported:
        if str(dtype) == f"torch.{saved}":
            return dtype
    return supported[0]


# ---- Reading: a folder of .npy files -> one packed array -----------------------------------------

GAP = 50  # rows of zeros between utterances, at least; contexts up to this share a cache file
MOST_COEFFICIENTS = 100  # more columns are not MFCCs, perhaps frames: a transposed array
_INDEX = {phoneme: i for i, phoneme in enumerate(PHONEMES[:40])}


def _mfccs(array, coefficients):
    """Check one utterance's MFCCs (T, k) and normalise them over time: (x - mean) / (std + 1e-8).

    Returns them, float64 (T, k), and the mean (k,) and the standard deviation (k,) that they had.
    """
    if array.dtype.kind != "f" or array.dtype.itemsize > 8:
        raise ValueError(f"dtype {array.dtype}; expected float32")
    if array.ndim != 2 or len(array) < 1 or array.shape[1] != coefficients:
        raise ValueError(
            f"shape {array.shape}; expected (frames, {coefficients}) with at least one frame"
        )
    with np.errstate(all="ignore"):
        # Less the first row, a constant coefficient is exactly zero. Its mean may be a little off
        # otherwise, and what is left would be divided by 1e-8.
        first = array[0].astype(np.float64)
        array = np.subtract(array, first, dtype=np.float64)
        mean = array.mean(axis=0)
        array -= mean
        std = np.sqrt(np.square(array).mean(axis=0))
        array /= std + 1e-8
    # infinite values, or such large ones that their squares overflow, show in the deviation too
    if not np.isfinite(std).all():
        raise ValueError("NaN, infinite or absurdly large values; expected finite MFCCs")
    return array, first + mean, std


def _labels(array):
    """Check one utterance's transcript, text (T+2,), and turn it into indexes, uint8 (T,)."""
    if array.dtype.kind != "U":
        raise ValueError(f"dtype {array.dtype}; expected text, <U5")
    if array.ndim != 1 or len(array) < 3:
        raise ValueError(
            f"shape {array.shape}; expected (frames + 2,) for [SOS], one phoneme per frame, [EOS]"
        )
    first, last = str(array[0]), str(array[-1])
    if OLD_SPELLING.get(first, first) != "[SOS]" or OLD_SPELLING.get(last, last) != "[EOS]":
        raise ValueError(
            f"it starts with {first!r} and ends with {last!r}; expected [SOS] and [EOS]"
        )
    array = array[1:-1]
    # a phoneme lasts for several frames, which share one look-up
    is_new = np.append(True, array[1:] != array[:-1])
    starts = np.flatnonzero(is_new)
    lengths = np.diff(starts, append=len(array))
    indexes = []
    for start, phoneme in zip(starts, array[starts].tolist()):
        index = _INDEX.get(OLD_SPELLING.get(phoneme, phoneme))
        if index is None:
            raise ValueError(
                f"{phoneme!r} at frame {start} is not a phoneme; expected one of {' '.join(_INDEX)}"
            )
        indexes.append(index)
    return np.repeat(np.array(indexes, np.uint8), lengths)


def _read_ahead(paths):
    """The bytes of each of these files; None for one that cannot be read.

    `_load_npy` tries that one again, and raises the error where it is dealt with.
    """
    contents = []
    for path in paths:
        try:
            contents.append(path.read_bytes())
        except OSError:
            contents.append(None)
    return contents


def _load_npy(path, content=None):
    """The array in an .npy file. content: the bytes of the file, if they have been read already.

    Raises an OSError if the file cannot be read, a ValueError if it is not one whole array.
    """
    if content is None:
        content = path.read_bytes()
    file = io.BytesIO(content)
    try:
        array = np.lib.format.read_array(file, allow_pickle=False)
        if file.read(1):
            raise ValueError("there is more in it")
        return array
    except Exception as error:  # the parsers of numpy and Python raise a dozen kinds
        raise ValueError(f"{error}; expected one whole array in an .npy file") from None


def _count_coefficients(paths):
    """How many MFCCs a frame has: what most of the first five files say."""
    found = []
    for path in paths[:5]:
        with contextlib.suppress(Exception):  # a faulty file is reported when its turn comes
            frames, coefficients = _load_npy(path).shape
            if 1 <= coefficients <= MOST_COEFFICIENTS:
                found.append(coefficients)
    return statistics.mode(found) if found else 28  # as in most editions


@contextlib.contextmanager
def _note_faults(path, faults):
    """Append what goes wrong in the block to the list `faults`, with the name of the file."""
    try:
        yield
    except Exception as error:  # whatever a damaged file provokes is that file's fault
        faults.append(f"{path}: {error}")


def _convert(paths, contents, coefficients):
    """Check and convert the files of one utterance, the MFCCs and, if there is one, the transcript.

    Returns what `_mfccs` gives, what `_labels` gives, and a list of what is wrong with the files.
    What is faulty or not there is None.
    """
    mfccs = None
    labels = None
    faults = []
    with _note_faults(paths[0], faults):
        mfccs = _mfccs(_load_npy(paths[0], contents[0]), coefficients)
    if len(paths) == 2:
        with _note_faults(paths[1], faults):
            labels = _labels(_load_npy(paths[1], contents[1]))
            if mfccs is not None and len(labels) != len(mfccs[0]):
                raise ValueError(f"{len(labels)} phonemes; expected {len(mfccs[0])}, one per frame")
    return mfccs, labels, faults


def _raise_faults(folder, faults):
    """Raise a DataError if there are faults. It counts them, and lists the first ten."""
    if faults:
        lines = [f"{folder}: {len(faults):,} fault(s) in the data", *first_ten(faults)]
        raise DataError(_printable("\n".join(lines)))


def _printable(text):
    """A text with names of files, in which bytes that are no text are escaped."""
    return text.encode(errors="backslashreplace").decode()


def _pack(folder, names, kinds, gap):
    """Read, check, normalise and pack utterances: what `read_partition` returns."""
    print(f"reading {len(names):,} utterances of {folder.name}")
    paths = [[folder / kind / name for kind in kinds] for name in names]  # of each utterance
    mfcc_paths = [files[0] for files in paths]
    faults = []
    lengths = []
    means = []
    stds = []
    labels = [np.zeros(0, np.uint8)]  # for test nothing else comes
    with warnings.catch_warnings():
        # numpy and Python warn about what stands in a damaged header
        warnings.simplefilter("ignore")
        coefficients = _count_coefficients(mfcc_paths)
        # Room for as many frames as the files can hold, at two bytes a number. The pages of an
        # array of zeros take no memory until something is written to them.
        size = sum(path.stat().st_size for path in mfcc_paths if path.exists())
        rows = size // (2 * coefficients) + gap * (len(names) + 1)
        frames = torch.from_numpy(np.zeros((rows, coefficients), np.float16))
        row = gap
        # To read small files is mostly to wait, so threads do it. They do not parse them: in
        # Python 3.11 the parser of the headers is not thread-safe.
        for files, contents in zip(paths, map_in_threads(_read_ahead, paths)):
            mfccs, phonemes, new_faults = _convert(files, contents, coefficients)
            faults += new_faults
            if faults:
                continue  # nothing will be returned: only look for more of them
            mfcc, mean, std = mfccs
            frames[row : row + len(mfcc)] = torch.from_numpy(mfcc)
            row += len(mfcc) + gap
            lengths.append(len(mfcc))
            means.append(mean)
            stds.append(std)
            if phonemes is not None:
                labels.append(phonemes)
    _raise_faults(folder, faults)
    return {
        "frames": frames[:row],
        "offsets": torch.tensor([0, *itertools.accumulate(lengths)]),
        "labels": torch.from_numpy(np.concatenate(labels)),
        "means": torch.tensor(np.mean(means, axis=0), dtype=torch.float32),
        "stds": torch.tensor(np.mean(stds, axis=0), dtype=torch.float32),
    }


# What makes the numbers in the cache, with all that it uses: a cache of other code is made anew.
READING_CODE = {"_pack": _pack}


def _npy_files(folder):
    """Sorted names of the utterances' files in a folder, and of all else in it, which is not data.

    That is clutter, names without .npy at the end, and copies beside their original: "x (1).npy",
    "x copy.npy", "x - Copy.npy", "x-Copy1.npy".
    """
    found = set(os.listdir(folder))
    utterances = []
    for name in found:
        copied = re.match("(.+?)( |-Copy)", name)
        is_copy = copied is not None and f"{copied[1]}.npy" in found
        if name.endswith(".npy") and not is_clutter(name) and not is_copy:
            utterances.append(name)
    return sorted(utterances), sorted(found - set(utterances))


def _list_utterances(folder, kinds, subset):
    """Sorted names of the first utterances of a partition, the share `subset` of all.

    Raises a DataError if a folder or a file's counterpart is missing, or no utterance is left.
    """
    names = {}
    for kind in kinds:
        if not (folder / kind).is_dir():
            raise DataError(
                f"{folder / kind}: there is no such folder; expected "
                "ROOT/{train-clean-100,dev-clean}/{mfcc,transcript}/*.npy and "
                "ROOT/test-clean/mfcc/*.npy"
            )
        names[kind], ignored = _npy_files(folder / kind)
        if ignored:
            examples = ", ".join(_printable(name) for name in ignored[:5])
            print(
                f"{folder.name}: ignored {len(ignored)} file(s) in {kind} "
                f"that are not utterances: {examples}"
            )
    mfccs = names["mfcc"]
    if not mfccs:
        raise DataError(
            f"{folder / 'mfcc'}: there are no .npy files in it; expected one for each utterance"
        )
    faults = []
    for kind, other in itertools.permutations(kinds, 2):
        missing = "transcript" if other == "transcript" else "MFCC file"
        for name in sorted(set(names[kind]) - set(names[other])):
            faults.append(
                f"{folder / kind / name}: no {missing} of the same name in {folder / other}"
            )
    _raise_faults(folder, faults)
    count = int(subset * len(mfccs))
    if count < 1:
        raise DataError(
            f"{folder}: subset {subset} of its {len(mfccs)} utterances is none; "
            "expected at least one"
        )
    return mfccs[:count]


def _cache_key(folder, names, kinds, gap):
    """A fingerprint of all that the cache depends on: its format, the gap, and the files.

    Of these it takes the name, the size and the time of the last change, not the content.
    """

    def stamp(name):
        sizes_and_times = []
        for kind in kinds:
            try:
                stat = os.stat(os.path.join(folder, kind, name))
            except OSError:  # a broken link, which is reported when it is read
                return None
            sizes_and_times.append((stat.st_size, stat.st_mtime_ns))
        return name, *sizes_and_times

    stamps = list(map_in_threads(stamp, names))
    text = repr(("packed 5", folder.name, gap, stamps))
    return hashlib.sha256(text.encode()).hexdigest()


def _as_tensor(text):
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def _as_text(tensor):
    return tensor.numpy().tobytes().decode()


def _load_tensors(path):
    """The tensors in a safetensors file, mapped into memory if possible."""
    try:
        return safetensors.torch.load_file(path)
    except Exception:  # some network disks cannot map: the whole file is read
        return safetensors.torch.load(path.read_bytes())


def _open_cache(path, key):
    """The packed tensors of a cache file; None if it is missing, damaged or out of date.

    That is if its fingerprint is not `key`, or the code of this section was edited since.
    """
    try:
        packed = _load_tensors(path)
        same_key = _as_text(packed.pop("key")) == key
        code = json.loads(_as_text(packed.pop("code")))
        same_code = not code_differences(code, code_of(READING_CODE))
    except Exception:  # whatever is wrong with it, it is made anew
        return None
    return packed if same_key and same_code else None


def _write_cache(path, key, packed):
    code = json.dumps(code_of(READING_CODE))
    tensors = {**packed, "key": _as_tensor(key), "code": _as_tensor(code)}
    with atomic_write(path, packed["frames"].nbytes) as temporary:
        safetensors.torch.save_file(tensors, temporary)


def read_partition(root, partition, subset=1, gap=GAP, cache=None):
    """Read, check, normalise and pack one partition.

    root: data folder in the course's layout.
    partition: "train-clean-100", "dev-clean", or "test-clean" (without transcripts, always whole).
    subset: the first int(subset * n) utterances of the n, in sorted order.
    gap: rows of zeros before, between and after the utterances.
    cache: folder for a packed copy (safetensors), which is written once and then mapped into
        memory. It is made anew if a file or the code of this section has changed.

    Returns a dict of tensors on the CPU, where k is the number of MFCCs in a frame:
        "frames": float16 (rows, k), normalised per utterance, with `gap` rows of zeros between.
        "labels": uint8 (n,), the phoneme's index of each frame; empty for test.
        "offsets": int64 (utterances + 1,), the first frame of each utterance, and n. The gaps do
            not count.
        "means" and "stds": float32 (k,), each coefficient's mean and standard deviation before
            the normalisation, as means over the utterances.

    Raises a DataError that counts all faulty files and names the first ten.
    """
    folder = Path(root) / partition
    kinds = KINDS
    if partition == "test-clean":
        kinds = KINDS[:1]
        subset = 1
    names = _list_utterances(folder, kinds, subset)
    if cache is None:
        return _pack(folder, names, kinds, gap)
    key = _cache_key(folder, names, kinds, gap)
    path = Path(cache) / f"{partition}-{key[:16]}.safetensors"
    packed = _open_cache(path, key)
    if packed is not None:
        return packed
    try:
        with one_process_at_a_time(path):
            packed = _open_cache(path, key)  # another notebook may have made it meanwhile
            if packed is None:
                packed = _pack(folder, names, kinds, gap)
                _write_cache(path, key, packed)
    except RunError as error:  # the cache is a convenience
        print(f"going on without a cache: {error}")
        if packed is None:
            packed = _pack(folder, names, kinds, gap)
    return packed


# The two conventions of MFCCs that we know. In the natural order c0, c1, ... each has the factor 1.
CONVENTIONS = ("HTK", "torchaudio")


def columns_of(convention, coefficients):
    """Which coefficient each of the columns is, int64 (k,), and its factor, float32 (k,).

    "HTK": c1, c2, ..., c0; c0 times sqrt 2, c_i times the lifter 1 + 11 sin(pi i / 22), which is
    negative from c23 on (The HTK Book, sections 5.4 and 5.6). The course's features are such.
    "torchaudio": c0, c1, c2, ... as the cosine transform gives them (torchaudio.transforms.MFCC).
    """
    order = torch.arange(coefficients)
    if convention == "torchaudio":
        return order, torch.ones(coefficients)
    lifter = 1 + LIFTER / 2 * torch.sin(torch.pi * order / LIFTER)
    lifter[0] = 2**0.5
    return order.roll(-1), lifter.roll(-1)


def find_convention(means, stds):
    """By which convention were these MFCCs made? "HTK", "torchaudio", or None if by neither.

    means, stds: float32 (k,), of the coefficients before normalisation, over a training set.
    c0, the loudness, has by far the largest mean; it is HTK's last column and torchaudio's first.
    c1 varies at least four times as much as c11, or about as much if there is a lifter.
    """
    if len(means) < 13:
        return None
    second, largest = means.abs().sort().values[-2:]
    if largest < 1.25 * second or largest < 1e-3:  # they have no means: were normalised before
        return None
    for convention in CONVENTIONS:
        order, _ = columns_of(convention, len(means))
        column_of = {coefficient: column for column, coefficient in enumerate(order.tolist())}
        liftered = stds[column_of[1]] < 2.4 * stds[column_of[11]]
        if means.abs().argmax() == column_of[0] and liftered == (convention == "HTK"):
            return convention
    return None


def describe_columns(data):
    """A line for the user: the convention of an `AudioDataset`'s columns, and where c0 is."""
    if data.convention is None:
        return (
            "WARNING: these columns are neither HTK's nor torchaudio's MFCCs, so nobody knows how "
            "to stretch their frequencies: config['warp'] and config['test_warps'] are not used"
        )
    column = "the last one" if data.convention == "HTK" else "the first one"
    return (
        f"{data.coefficients} MFCCs per frame in {data.convention}'s order: "
        f"c0, the loudness, is {column}"
    )


# ---- Windows and loaders -------------------------------------------------------------------------


class AudioDataset(Dataset):
    """Frames of one partition, each with `context` frames on either side.

    Beyond the ends of its utterance a frame's context is zeros. The utterances lie in one array on
    the device, with rows of zeros between them, and a window is 2c+1 of its rows. The view
    `windows`, whose row i shows the array from row i on, holds all windows without a copy, so a
    batch is one gather:

        array     0 0 a b c d 0 0 e f g 0 0       two utterances, abcd and efg; context 2
        windows  [0 0 a b c]                      row 0: the window of frame a
                   [0 a b c d]                    row 1: of frame b
                              ...
                             [0 0 e f g]          row 6: of frame e

    Args:
        root, partition, subset, cache: see `read_partition`, also for the errors.
        context: frames on either side, c.
        device: where the array lies and the batches are made.
        like: the training set, for the other partitions: they take its `convention`. Raises a
            DataError if they have another number of coefficients.

    Attributes, beside some of the arguments:
        coefficients: MFCCs per frame, k.
        convention: by which the MFCCs were made, see `find_convention`.
        stds: float32 (k,), the standard deviations before the normalisation.
        frames, labels, offsets: see `read_partition`; labels is None for test.
        length, utterances: the number of frames, and of utterances.

    Example:
        data = AudioDataset(root, "dev-clean", context=50)
        frames, phoneme = data[0]                      # float16 (101, 28), int64 ()
        frames, phonemes = data[torch.tensor([0, 7])]  # float16 (2, 101, 28), int64 (2,)
        For the partition "test-clean" there are no phonemes: data[0] is the frames alone.
    """

    def __init__(
        self,
        root,
        partition="train-clean-100",
        context=50,
        subset=1,
        device="cpu",
        cache=None,
        like=None,
    ):
        self.partition = partition
        self.context = context
        self.gap = max(GAP, context)
        packed = read_partition(root, partition, subset, self.gap, cache)
        self.frames = packed["frames"].to(device)
        self.offsets = packed["offsets"].to(device)
        self.stds = packed["stds"].to(device)
        self.labels = packed["labels"].to(device) if len(packed["labels"]) > 0 else None
        self.length = int(packed["offsets"][-1])
        self.utterances = len(packed["offsets"]) - 1
        rows, self.coefficients = self.frames.shape

        if like is None:
            self.convention = find_convention(packed["means"], packed["stds"])
        elif like.coefficients == self.coefficients:
            self.convention = like.convention
        else:
            raise DataError(
                f"{Path(root) / partition / 'mfcc'}: {self.coefficients} MFCCs per frame; "
                f"expected {like.coefficients}, as in {like.partition}"
            )

        width = 2 * context + 1
        size = (rows - width + 1, width * self.coefficients)
        self.windows = self.frames.as_strided(size, stride=(self.coefficients, 1))

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        if isinstance(index, torch.Tensor) and index.dim() == 1:
            return self._batch(index)
        # as in a list: negative indexes count from the end, others may raise an IndexError
        index = range(self.length)[int(index)]
        batch = self._batch(torch.tensor([index], device=self.frames.device))
        if self.labels is None:
            return batch[0]
        frames, phonemes = batch
        return frames[0], phonemes[0]

    def _batch(self, index):
        # there is a gap before each utterance: how many lie before these frames?
        gaps = torch.searchsorted(self.offsets, index, right=True)
        first_rows = index + self.gap * gaps - self.context
        frames = torch.index_select(self.windows, 0, first_rows)
        frames = frames.view(len(index), -1, self.coefficients)
        if self.labels is None:
            return frames
        return frames, self.labels[index].long()

    def utterance(self, i):
        """(MFCCs float16 (T, k), phoneme indexes uint8 (T,) or None for test) of utterance i."""
        first = self.offsets[i].item()
        last = self.offsets[i + 1].item()
        shift = self.gap * (i + 1)
        frames = self.frames[first + shift : last + shift]
        labels = None if self.labels is None else self.labels[first:last]
        return frames, labels


class Batches(Sampler):
    """Batches of frame indexes: int64 tensors on the device, in order or shuffled.

    The order of the shuffled ones depends on the seed (0 or more) and the epoch.
    torch's RandomSampler makes a Python list of all indexes, a gigabyte for 36 million frames.
    """

    def __init__(self, length, batch_size, shuffle=False, seed=23, device="cpu"):
        self.length = length
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.device = device
        self.epoch = 0

    def set_epoch(self, epoch):
        """As in torch's DistributedSampler: a resumed run repeats the order of the epoch."""
        self.epoch = epoch

    def __iter__(self):
        if self.shuffle:
            # mixed, or the second epoch of one seed would be the first epoch of the next seed
            mixed = np.random.SeedSequence([self.seed, self.epoch]).generate_state(1)
            generator = torch.Generator(self.device).manual_seed(mixed.item())
            order = torch.randperm(self.length, generator=generator, device=self.device)
        else:
            order = torch.arange(self.length, device=self.device)
        return iter(order.split(self.batch_size)[: len(self)])

    def __len__(self):
        if self.shuffle and self.length % self.batch_size == 1:
            # BatchNorm cannot train on the single frame that is left over: this epoch is without it
            return self.length // self.batch_size
        return math.ceil(self.length / self.batch_size)


def make_loader(dataset, batch_size, shuffle=False, seed=23):
    """A DataLoader of whole batches: float16 (B, 2c+1, k) and int64 (B,), on the device.

    For test they are the frames alone. There are no workers: a batch is one gather, which is
    quicker than passing it from one process to another.
    dataset: an AudioDataset. Raises a DataError for others, such as torch's Subset.
    """
    if not isinstance(dataset, AudioDataset):
        raise DataError(
            f"make_loader has got a {type(dataset).__name__}; expected an AudioDataset. A part of "
            "the utterances, or several partitions as one, is a folder of links to their files: "
            "see section 12 of the notebook"
        )
    sampler = Batches(len(dataset), batch_size, shuffle, seed, dataset.frames.device)
    return DataLoader(dataset, sampler=sampler, batch_size=None)


# ---- Augmentation --------------------------------------------------------------------------------


def _draw_masks(windows, length, longest, device):
    """A random mask for each window: bool (windows, length), False in one stretch of it.

    The width of the stretch is uniform over 0 ... `longest`, its position over all that fit.
    """
    width, start = torch.rand(2, windows, 1, device=device)
    width = (width * (min(longest, length) + 1)).long()
    start = (start * (length - width + 1)).long()
    position = torch.arange(length, device=device)
    return (position < start) | (position >= start + width)


def mask_frames(frames, augmentations="Both", freq_mask_param=4, time_mask_param=8):
    """SpecAugment's masks: a stretch of coefficients and/or of frames is set to zero, the mean.

    It is drawn anew for every window: the width is uniform over 0 ... param, and the position over
    all that fit (Park et al., "SpecAugment", 2019).

    frames: float16 or float32 (B, 2c+1, k); changed in place, and returned.
    augmentations: "FreqMask", "TimeMask", "Both" or None. Raises a ValueError for others.
    """
    if augmentations not in ("FreqMask", "TimeMask", "Both", None):
        raise ValueError(
            f"there is no mask {augmentations!r}; expected 'FreqMask', 'TimeMask', 'Both' or None"
        )
    windows, length, coefficients = frames.shape
    # to multiply by 0 or 1 does the same to integers of these bits, five times as fast on a CPU
    bits = frames.view(torch.int16 if frames.dtype == torch.float16 else torch.int32)
    if augmentations in ("FreqMask", "Both"):
        keep = _draw_masks(windows, coefficients, freq_mask_param, frames.device)
        bits.mul_(keep[:, None, :])
    if augmentations in ("TimeMask", "Both"):
        keep = _draw_masks(windows, length, time_mask_param, frames.device)
        bits.mul_(keep[:, :, None])
    return frames


def _natural_maps(factors, coefficients, bands):
    """Maps that warp MFCCs in their natural order: one for each of the factors, float32 (n,).

    The way leads back to the log energies of the mel bands (on HTK's mel scale, from 0 to 8 kHz),
    reads them at the factor times their frequencies, and returns by the cosine transform.
    Returns float32 (n, k, k): cepstra (..., k) @ map are the warped ones.
    """

    def hertz_to_mel(hertz):
        return 2595 * torch.log10(1 + hertz / 700)

    def mel_to_hertz(mel):
        return 700 * (10 ** (mel / 2595) - 1)

    band = torch.arange(bands)
    step = hertz_to_mel(torch.tensor(8000.0)) / (bands + 1)  # from one band to the next, in mel
    centres = mel_to_hertz((band + 1) * step)
    # where each band is read, as a number of a band: (n, bands)
    positions = hertz_to_mel(factors[:, None] * centres) / step - 1
    positions = positions.clamp(0, bands - 1)
    # linear interpolation between the two bands beside it: (n, bands from, bands to)
    distance = (positions[:, None, :] - band[:, None]).abs()
    interpolation = (1 - distance).clamp(min=0)
    # the orthonormal cosine transform, (bands, k), as torchaudio's `create_dct` makes it;
    # but training needs no torchaudio
    dct = torch.cos(math.pi / bands * (band + 0.5)[:, None] * torch.arange(coefficients))
    dct[:, 0] *= 0.5**0.5
    dct *= (2 / bands) ** 0.5
    return dct.T @ interpolation @ dct


def warp_maps(strength, data, count=41, dtype=torch.float32):
    """Maps that stretch or squeeze frequencies by factors from 1 - strength to 1 + strength.

    The factors are evenly spaced. The idea: Jaitly and Hinton, "Vocal Tract Length Perturbation",
    2013.

    data: an `AudioDataset`, whose convention says what its columns are (see `columns_of`).
    Returns the maps, (count, k, k) of `dtype`, on the device of the data: normalised frames @ map
    are the warped ones. None if the strength is 0 or the convention is not known: there are no
    warps then.
    """
    if strength == 0 or data.convention is None:
        return None
    usual_bands = 28 if data.convention == "HTK" else 40
    bands = max(usual_bands, data.coefficients)
    factors = torch.linspace(1 - strength, 1 + strength, count)
    maps = _natural_maps(factors, data.coefficients, bands)

    # The data have the same coefficients in an order of their own, each multiplied by its factor
    # and divided by its standard deviation.
    order, multipliers = columns_of(data.convention, data.coefficients)
    maps = maps[:, order][:, :, order].to(data.stds.device)
    stds = data.stds.clamp(min=data.stds.max() / 1000)  # that of a constant coefficient is 0
    scale = multipliers.to(stds.device) / stds
    maps = maps / scale[:, None] * scale

    # Reading between the bands shrinks the high coefficients: each is scaled to the standard
    # deviation 1 again, as if the coefficients did not correlate.
    new_stds = maps.norm(dim=1, keepdim=True)
    return (maps / new_stds).to(dtype)


def warp_frames(frames, maps):
    """Send each window of frames (B, 2c+1, k) through one of the maps (n, k, k), at random.

    The frames are changed in place, and returned.
    """
    which = torch.randint(len(maps), (len(frames),), device=frames.device)
    warped = frames.to(maps.dtype) @ maps[which]
    return frames.copy_(warped)


# ---- Network -------------------------------------------------------------------------------------


class Dropout(torch.nn.Dropout):
    """torch's dropout, quicker on a CPU: four units share one random number of 64 bits.

    So p has steps of 1/65536 there. It may change during the training (see `scale_dropout`),
    compiled or not.
    """

    @property
    def p(self):
        return self._p

    @p.setter
    def p(self, p):
        self._p = p
        if "rate_now" in self._buffers:
            self.rate_now.fill_(p)
        else:  # a compiled network takes a number for a constant, but not a tensor
            self.register_buffer("rate_now", torch.tensor(float(p)), persistent=False)

    def forward(self, x):
        if not self.training:
            return x
        if torch.compiler.is_compiling():
            keep = torch.rand(x.shape, device=x.device) >= self.rate_now
            return x * keep.to(x.dtype) / (1 - self.rate_now).to(x.dtype)
        if x.device.type != "cpu":
            return super().forward(x)
        numbers = torch.empty(math.ceil(x.numel() / 4), dtype=torch.int64)
        numbers.random_(-(2**63), None)  # all 64 bits
        quarters = numbers.view(torch.int16)[: x.numel()].view_as(x)  # -2^15 ... 2^15 - 1
        keep = quarters >= round(self.p * 2**16) - 2**15
        factors = keep.to(x.dtype).mul_(1 / (1 - self.p))
        return x * factors


DROPOUTS = (
    torch.nn.Dropout,
    torch.nn.Dropout1d,
    torch.nn.Dropout2d,
    torch.nn.Dropout3d,
    torch.nn.AlphaDropout,
    torch.nn.FeatureAlphaDropout,
)


def hidden_layers(model):
    """The Linear layers of a model, in the order of their definition, but not the output layer.

    The output layer is the one of 42 units.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear)]
    return [layer for layer in layers if layer.out_features != len(PHONEMES)]


def scale_dropout(model, factor, by_width):
    """Set the rate p of every dropout layer to its original rate times a factor, at most 0.99.

    by_width: multiply it by n / 1600 as well in a layer of n < 1600 units: in a sum over its units,
    dropout p is noise in proportion to p / ((1 - p) n). n is that of the last of the
    `hidden_layers` defined before it; without one, the layer gets the factor whole.
    tests/benchmarks/accuracy.md has the measurements behind it.

    `functional.dropout` is no layer, and is not scaled. A layer's original rate is kept in it as
    `rate`.
    """
    hidden = {id(layer) for layer in hidden_layers(model)}
    width_factor = 1
    for layer in model.modules():
        if by_width and id(layer) in hidden:
            width_factor = min(layer.out_features / 1600, 1)  # of the dropout behind it
        elif isinstance(layer, DROPOUTS):
            layer.rate = getattr(layer, "rate", layer.p)
            layer.p = min(factor * width_factor * layer.rate, 0.99)


def print_layers(model, frames):
    """Print torchsummaryX's table of a model's layers for these frames, or else the model."""
    try:
        install("torchsummaryX==1.1.0")
        from torchsummaryX import summary

        summary(model, frames)
    except Exception as error:  # it cannot be installed, or does not know what to make of a module
        print(f"no table of the layers ({error!r:.200}):\n{model}")


# ---- Loss and schedule ---------------------------------------------------------------------------


def loss_weight(criterion, phonemes):
    """How much the mean loss of a batch weighs in the mean of an epoch; phonemes: int64 (B,).

    That is the number of frames. But torch's cross entropy may have weights of the classes or
    ignore one: then it divides by the sum of the frames' weights, which is what this gives. So the
    loss of a data set does not depend on the size of its batches.
    Other losses, and functions, are assumed to be means over the frames.
    """
    divides = torch.nn.CrossEntropyLoss.forward, torch.nn.NLLLoss.forward
    if getattr(type(criterion), "forward", None) not in divides:
        return len(phonemes)
    if criterion.weight is None and criterion.ignore_index < 0:
        return len(phonemes)
    weights = 1.0 if criterion.weight is None else criterion.weight[phonemes]
    counts = phonemes != criterion.ignore_index
    return (weights * counts).sum()


def check_schedule(scheduler, step, epochs, steps):
    """Raise a RunError if one of torch's schedulers will not be stepped as it was made for.

    step: when it is stepped: after each "epoch", after each "batch", or with each epoch's
        "val_loss".
    steps: batches per epoch.
    """
    name = type(scheduler).__name__
    if step not in ("epoch", "batch", "val_loss"):
        raise RunError(f"{name} with step={step!r}: expected 'epoch', 'batch' or 'val_loss'")
    if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau) and step != "val_loss":
        raise RunError(f"{name} needs to know the loss: Schedule(..., step='val_loss')")
    times = epochs * steps if step == "batch" else epochs
    planned = getattr(scheduler, "total_steps", times)  # OneCycleLR has it
    if planned != times:
        raise RunError(
            f"{name} is made for {planned:,} steps, but with step={step!r} it is stepped "
            f"{times:,} times: {epochs:,} epochs of {steps:,} batches"
        )


@contextlib.contextmanager
def ignore_skipped_steps():
    """Silence torch's warning that a schedule is stepped before the optimizer.

    With float16 the first steps of the optimizer may have been skipped.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
        yield


@contextlib.contextmanager
def explain_out_of_memory(config):
    """Turn torch's error that the GPU's memory is full into a RunError that says what to change."""
    try:
        yield
    except torch.cuda.OutOfMemoryError:
        size = config["batch_size"]
        raise RunError(
            f"the GPU's memory is too small for batch_size {size}. Restart the kernel; if that "
            f"does not help, try another config['Name'] with batch_size {max(size // 2, 2)}."
        ) from None


def check_finite(train_loss, val_loss, epoch, config):
    """Raise a RunError that says what to change if one of the losses of an epoch is not finite."""
    if not np.isfinite([train_loss, val_loss]).all():
        raise RunError(
            f"the loss of epoch {epoch} is not finite; the checkpoint of epoch {epoch - 1} is "
            "intact. Try, under another config['Name'], the learning rate "
            f"{config['learning_rate'] / 10:g}, batch_norm, or another weight_initialization."
        )


# ---- Metrics -------------------------------------------------------------------------------------


def confusion_matrix(labels, predictions):
    """Counts, int64 (42, 42): row = true phoneme, column = predicted one.

    labels, predictions: integers (n,).
    """
    n = len(PHONEMES)
    cells = np.asarray(labels, np.int64) * n + np.asarray(predictions)
    return np.bincount(cells, minlength=n * n).reshape(n, n)


def accuracy_by_phoneme(confusion):
    """A table of the phonemes that occur: their frames and their accuracy (0-1), best one first.

    confusion: see `confusion_matrix`.
    """
    frames = confusion.sum(1)
    accuracy = confusion.diagonal() / frames.clip(1)
    table = pd.DataFrame({"phoneme": PHONEMES, "frames": frames, "accuracy": accuracy})
    return table[frames > 0].sort_values("accuracy", ascending=False)


def top_confusions(confusion, count=10):
    """A table of the most common confusions: the two phonemes, how many frames, their shares.

    confusion: see `confusion_matrix`.
    """
    errors = confusion.copy()
    np.fill_diagonal(errors, 0)
    most_common = errors.ravel().argsort()[::-1][:count]
    rows = []
    for true, predicted in zip(*np.unravel_index(most_common, errors.shape)):
        frames = errors[true, predicted]
        rows.append(
            {
                "true": PHONEMES[true],
                "taken for": PHONEMES[predicted],
                "frames": frames,
                "% of its frames": 100 * frames / max(confusion[true].sum(), 1),
                "% of all errors": 100 * frames / max(errors.sum(), 1),
            }
        )
    return pd.DataFrame(rows)


def share_within_manners(confusion):
    """The share (0-1) of the errors that are between phonemes of the same one of the MANNERS.

    confusion: see `confusion_matrix`. Without errors it is 0.
    """
    is_in = [[phoneme in group for phoneme in PHONEMES] for group in MANNERS.values()]
    is_in = np.array(is_in, int)  # (manners, 42); [SOS] and [EOS] are in none
    share_manner = (is_in.T @ is_in).astype(bool)  # (42, 42)
    correct = confusion.diagonal().sum()
    errors = confusion.sum() - correct
    errors_within = confusion[share_manner].sum() - correct
    return errors_within / max(errors, 1)


def boundary_distance(labels, offsets):
    """Frames from each frame to the nearest phone boundary, int64 (n,); 0 beside the boundary.

    labels: integers (n,). offsets: (utterances + 1,), the first frame of each utterance, and n.
    The ends of an utterance are boundaries too.
    """
    labels, offsets = np.asarray(labels), np.asarray(offsets)
    starts_phone = np.concatenate(([True], labels[1:] != labels[:-1]))
    starts_phone[offsets[:-1]] = True
    boundaries = np.append(np.flatnonzero(starts_phone), len(labels))
    frame = np.arange(len(labels))
    after = np.searchsorted(boundaries, frame, side="right")  # the next boundary behind each frame
    from_start = frame - boundaries[after - 1]
    to_end = boundaries[after] - 1 - frame
    return np.minimum(from_start, to_end)


def calibration(confidences, correct, bins=10):
    """Is a confidence of 80% right 80% of the time? (Guo et al., "On Calibration", 2017)

    confidences: float (n,), probability of the predicted phoneme; correct: bool (n,).
    Returns mean confidence, accuracy (NaN if a bin is empty) and count, (bins,) each, of equal bins
    of (0, 1]; and the expected calibration error, a float.
    """
    confidences = np.asarray(confidences)
    inner_edges = np.linspace(0, 1, bins + 1)[1:-1]
    which = np.digitize(confidences, inner_edges, right=True)
    count = np.bincount(which, minlength=bins)
    with np.errstate(invalid="ignore"):  # 0 / 0 in an empty bin
        confidence = np.bincount(which, confidences, bins) / count
        accuracy = np.bincount(which, correct, bins) / count
    gaps = np.abs(confidence - accuracy)
    error = np.nansum(gaps * count) / count.sum()
    return confidence, accuracy, count, float(error)


# ---- Figures -------------------------------------------------------------------------------------


def set_up_notebook():
    """Show figures in the notebook, whatever MPLBACKEND says; no warning if widgets are missing."""
    from IPython import get_ipython

    shell = get_ipython()
    if shell is not None:
        shell.run_line_magic("matplotlib", "inline")
    warnings.filterwarnings("ignore", "IProgress not found")  # tqdm's bar is of text then


def draw_frames(axis, frames):
    """Draw MFCCs (T, k) over time on an axis of matplotlib: red above the mean, blue below."""
    frames = frames.float().cpu().numpy()
    axis.imshow(
        frames.T,
        aspect="auto",
        origin="lower",
        cmap="RdBu_r",
        vmin=-3,
        vmax=3,
        interpolation="nearest",
        extent=(0, len(frames), -0.5, frames.shape[1] - 0.5),
    )
    axis.set(ylabel="MFCC")


def draw_phones(axis, labels, color="black"):
    """Write the phonemes of labels (T,), an array, over time on an axis, where there is room."""
    changes = np.flatnonzero(np.diff(labels)) + 1
    boundaries = [0, *changes, len(labels)]
    for first, end in zip(boundaries, boundaries[1:]):
        axis.axvline(first, color="lightgrey", linewidth=0.5)
        if end - first > 3:
            name = PHONEMES[labels[first]].strip("[]")
            middle = (first + end) / 2
            axis.text(middle, 0.5, name, ha="center", va="center", fontsize=9, color=color)
    axis.set(ylim=(0, 1), yticks=[])


def plot_utterance(data, i=0, frames=200):
    """The i-th utterance of an AudioDataset with labels: its MFCCs, its phonemes, and one window.

    frames: only the first ones are drawn, at most so many.
    """
    mfccs, labels = data.utterance(i)
    mfccs, labels = mfccs[:frames], labels[:frames].cpu().numpy()
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(11, 4), height_ratios=(5, 1), sharex=True, layout="constrained"
    )
    draw_frames(top, mfccs)
    middle = len(mfccs) // 2
    first, end = middle - data.context, middle + data.context + 1
    top.axvspan(first, end, facecolor="none", edgecolor="black", linewidth=1.5)
    top.axvline(middle + 0.5, color="black", linestyle=":")
    top.set(title=f"Utterance {i}; the box is the window of the frame at the dotted line")
    draw_phones(bottom, labels)
    bottom.set(xlabel="frame (10 ms)")
    plt.show()


def plot_windows(windows):
    """Windows side by side. windows: {title: tensor (2c+1, k)}."""
    figure, axes = plt.subplots(
        1, len(windows), figsize=(11, 2.4), sharey=True, layout="constrained", squeeze=False
    )
    for axis, (title, window) in zip(axes[0], windows.items()):
        draw_frames(axis, window)
        axis.set(title=title, xlabel="frame of the window", ylabel="")
    axes[0][0].set(ylabel="MFCC")
    plt.show()


def plot_history(history, config):
    """Loss and accuracy by epoch, the best one marked; below, the learning rate.

    history: dicts, one per epoch, as in `run.history`. Returns the figure.
    """
    table = pd.DataFrame(history).set_index("epoch")
    best = table["val_acc"].idxmax()
    figure, axes = plt.subplot_mosaic(
        [["loss", "acc"], ["rate", "rate"]],
        figsize=(11, 5),
        height_ratios=(4, 1),
        layout="constrained",
    )
    units = {"loss": (1, f"loss ({config['loss']})"), "acc": (100, "accuracy, % of frames")}
    for name, (unit, label) in units.items():
        axis = axes[name]
        training, validation = unit * table[f"train_{name}"], unit * table[f"val_{name}"]
        axis.plot(training, ".-", label="training (with masks, warps and dropout)")
        axis.plot(validation, ".-", label="validation")
        star = f"best validation accuracy: {table['val_acc'][best]:.2%}, epoch {best}"
        axis.plot(best, validation[best], "k*", markersize=12, label=star)
        axis.set(ylabel=label)
        axis.legend(fontsize=8)
    axes["rate"].plot(table["learning_rate"], ".-", color="grey")
    axes["rate"].set(ylabel="learning rate", xlabel="epoch", ylim=(0, None))
    for axis in axes.values():
        axis.set_xlim(0.5, max(config["epochs"], len(history)) + 0.5)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
    figure.suptitle(f"run: {config['Name']}")
    return figure


def plot_phonemes(by_phoneme, accuracy):
    """Accuracy of each phoneme, with its number of frames below its name.

    by_phoneme: of `accuracy_by_phoneme`. accuracy: of all frames (0-1), drawn as a line.
    """
    percent = 100 * by_phoneme["accuracy"].to_numpy()
    names = [
        f"{frames:,}   {phoneme:>5}"
        for phoneme, frames in zip(by_phoneme["phoneme"], by_phoneme["frames"])
    ]
    correlation = by_phoneme[["frames", "accuracy"]].rank().corr().iloc[0, 1]
    lowest = min(50, 10 * (percent.min() // 10))
    figure, axis = plt.subplots(figsize=(11, 4), layout="constrained")
    axis.vlines(range(len(names)), lowest, percent, color="lightsteelblue")
    axis.plot(range(len(names)), percent, "o", color="steelblue")
    axis.axhline(100 * accuracy, color="grey", linestyle=":", label=f"all frames: {accuracy:.1%}")
    axis.set_xticks(range(len(names)), names, rotation=90, fontsize=8, family="monospace")
    axis.set(
        ylabel="accuracy (%)",
        ylim=(lowest, 101),
        title="Validation accuracy of each phoneme; below its name, its frames "
        f"(rank correlation {correlation:.2f})",
    )
    axis.margins(x=0.01)
    axis.legend(loc="upper right")
    plt.show()


def plot_confusion(confusion):
    """A confusion matrix, int64 (42, 42), in % of each true phoneme, grouped by MANNERS."""
    order = [PHONEMES.index(phoneme) for group in MANNERS.values() for phoneme in group]
    names = [PHONEMES[i] for i in order]
    counts = confusion[np.ix_(order, order)]
    percent = 100 * counts / counts.sum(axis=1, keepdims=True).clip(1)
    figure, axis = plt.subplots(figsize=(9, 8), layout="constrained")
    colours = matplotlib.colors.SymLogNorm(linthresh=10, vmin=0, vmax=100)
    image = axis.imshow(percent, cmap="Blues", norm=colours)
    axis.set(
        xlabel="predicted",
        ylabel="true",
        title="Confusion matrix, % of each true phoneme's frames (colours linear up to 10%)",
    )
    axis.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    axis.set_yticks(range(len(names)), names, fontsize=7)
    edge = -0.5
    for name, group in MANNERS.items():
        size = len(group)
        square = plt.Rectangle((edge, edge), size, size, fill=False, edgecolor="darkorange")
        axis.add_patch(square)
        axis.text(len(names), edge + size / 2, name, va="center", fontsize=8, color="darkorange")
        edge += size
    figure.colorbar(image, shrink=0.6, pad=0.02, ticks=[0, 2, 5, 10, 100], format="%d")
    plt.show()


def plot_boundaries(truth, correct, offsets):
    """Accuracy, and the share of all errors, by the distance to the nearest phone boundary.

    truth: integer (n,). correct: bool (n,). offsets: see `boundary_distance`.
    """
    distance = boundary_distance(truth, offsets).clip(max=10)
    frames = np.bincount(distance, minlength=11)
    errors = np.bincount(distance, ~correct, minlength=11)
    figure, axis = plt.subplots(figsize=(7, 3.8), layout="constrained")
    accuracy = 100 * (1 - errors / frames.clip(1))
    share = 100 * errors / max(errors.sum(), 1)
    axis.bar(range(11), accuracy, color="steelblue", label="accuracy at this distance")
    axis.plot(range(11), share, "o-", color="firebrick", label="share of all errors")
    axis.set_xticks(range(11), [*range(10), "10+"])
    axis.set(
        xlabel="frames to the nearest phone boundary",
        ylabel="%",
        ylim=(0, 125),
        title="Validation frames by their distance to a phone boundary",
    )
    axis.legend(ncols=2, loc="upper center")
    plt.show()


def plot_calibration(confidences, correct):
    """Accuracy by confidence. confidences: float (n,), 0-1. correct: bool (n,)."""
    confidence, accuracy, count, error = calibration(confidences, correct)
    figure, axis = plt.subplots(figsize=(7, 3.8), layout="constrained")
    centres = np.arange(5, 100, 10)
    share = 100 * count / count.sum()
    axis.bar(centres, share, width=9, color="lightgrey", zorder=0, label="share of the frames")
    axis.plot([0, 100], [0, 100], ":", color="grey", label="ideal")
    axis.plot(100 * confidence, 100 * accuracy, "o-", color="steelblue", label="accuracy")
    axis.set(
        xlabel="confidence (%)",
        ylabel="%",
        title=f"Calibration (expected calibration error {error:.1%})",
    )
    axis.legend()
    plt.show()


def pick_utterance(results, frames=200):
    """The number of the utterance in whose first frames Viterbi corrects most.

    results: of the notebook's `evaluate_best`.
    """
    is_better = (results.decoded == results.truth).astype(int) - results.correct
    gains = []
    for first, end in zip(results.offsets, results.offsets[1:]):
        gains.append(is_better[first : min(end, first + frames)].sum())
    return int(np.argmax(gains))


def plot_prediction(results, data, i, frames=200):
    """An utterance as it is and as it was predicted: MFCCs, three rows of phonemes, the errors.

    results: of the notebook's `evaluate_best`. data: its validation set. i: the utterance.
    frames: only the first ones are drawn, at most so many.
    """
    first, end = results.offsets[i], results.offsets[i + 1]
    accuracy = results.correct[first:end].mean()
    end = min(end, first + frames)
    figure, axes = plt.subplots(
        5, 1, figsize=(11, 5.5), height_ratios=(5, 1, 1, 1, 0.5), sharex=True, layout="constrained"
    )
    draw_frames(axes[0], data.utterance(i)[0][:frames])
    axes[0].set(
        title=f"Validation utterance {i}: the network has {accuracy:.1%} of its frames right"
    )
    rows = {
        "true": (results.truth, "black"),
        "network": (results.predicted, "navy"),
        "Viterbi": (results.decoded, "darkgreen"),
    }
    for axis, (name, (labels, color)) in zip(axes[1:4], rows.items()):
        draw_phones(axis, labels[first:end], color)
        axis.set_ylabel(name, rotation=0, ha="right", va="center")
    errors = ~results.correct[None, first:end]
    extent = (0, end - first, 0, 1)
    axes[4].imshow(errors, aspect="auto", cmap="Reds", vmin=0, vmax=1, extent=extent)
    axes[4].set(xlabel="frame (10 ms)", yticks=[])
    axes[4].set_ylabel("errors of\nthe network", rotation=0, ha="right", va="center")
    plt.show()


def plot_runs(runs, names):
    """Validation accuracy by epoch. runs: {name: (config, history)}. names: in this order."""
    figure, axis = plt.subplots(figsize=(11, 5), layout="constrained")
    for name in names:
        history = pd.DataFrame(runs[name][1])
        axis.plot(history["epoch"], 100 * history["val_acc"], ".-", label=name)
    axis.set(xlabel="epoch", ylabel="validation accuracy (%)", title="The best run comes first")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    plt.show()


# ---- Decoding ------------------------------------------------------------------------------------


def count_transitions(labels, offsets, states=40):
    """How often each phoneme occurs, and what follows it from frame to frame in an utterance.

    labels: integers (n,) below `states`: the 40 phonemes, as no frame is [SOS] or [EOS].
    offsets: (utterances + 1,), the first frame of each utterance, and n.
    Returns log probabilities, float32, from counts to which one was added: (states,) of the
    phonemes, and (states, states), row = a frame's phoneme, column = the next frame's.
    """
    labels = labels.long()
    has_previous = torch.ones(len(labels), dtype=torch.bool, device=labels.device)
    has_previous[offsets[:-1]] = False  # the first frame of an utterance follows nothing
    pairs = (labels[:-1] * states + labels[1:])[has_previous[1:]]
    counts = torch.bincount(pairs, minlength=states**2).view(states, states).float() + 1
    prior = torch.bincount(labels, minlength=states).float() + 1
    transitions = counts / counts.sum(1, keepdim=True)
    return (prior / prior.sum()).log(), transitions.log()


def viterbi(scores, transitions, offsets):
    """The best path through each utterance, int64 (n,).

    scores: float32 (n, k) for each frame and state. transitions: float32 (k, k), row = from,
    column = to. offsets: (utterances + 1,), the first frame of each utterance, and n.
    """
    device = scores.device
    states = scores.shape[1]
    # All utterances are decoded at once, frame by frame. The longest come first, so that those
    # which have a frame t are the first ones: `active[t]` of them.
    lengths, order = offsets.diff().sort(descending=True)
    first_frames = offsets[:-1][order].to(device)
    lengths = np.array(lengths.tolist())
    times = np.arange(lengths[0])
    active = (lengths > times[:, None]).sum(1).tolist()

    # forwards: the score of the best path to each state, up to a constant of the frame
    best = scores.clone()
    for t in range(1, len(active)):
        frame = first_frames[: active[t]] + t
        total = (best[frame - 1].unsqueeze(2) + transitions).amax(1)
        best[frame] += total - total.amax(1, keepdim=True)  # small numbers stay exact

    # backwards: the state before a known one is the one that is best for it
    path = torch.empty(len(scores), dtype=torch.int64, device=device)
    nothing = states  # behind the last frame of an utterance, whatever the state
    to_next = torch.cat([transitions.T, torch.zeros(1, states, device=device)])
    next_state = torch.full((len(first_frames),), nothing, device=device)
    for t in reversed(range(len(active))):
        frame = first_frames[: active[t]] + t
        state = (best[frame] + to_next[next_state[: active[t]]]).argmax(1)
        path[frame] = state
        next_state[: active[t]] = state
    return path


class Decoder:
    """Viterbi decoding with the transitions of the training set's labels.

    A frame's score is its log posterior - `prior_scale` x the log prior; a step's score is
    `transition_weight` x the log probability of the transition, as in a hybrid HMM (Bourlard and
    Morgan, "Connectionist Speech Recognition", 1994).

    Args:
        labels: integers (n,), of the training set.
        offsets: (utterances + 1,), the first frame of each utterance, and n.
        prior_scale, transition_weight: see above; `tune` chooses them.

    Example:
        decoder = Decoder(train_data.labels, train_data.offsets)
        val_indexes = decoder.tune(val_log_posteriors, val_data.labels, val_data.offsets)
        test_indexes = decoder(test_log_posteriors, test_data.offsets)
    """

    def __init__(self, labels, offsets, prior_scale=0.0, transition_weight=1.0):
        self.prior, self.transitions = count_transitions(labels, offsets)
        self.prior_scale = prior_scale
        self.transition_weight = transition_weight

    def __call__(self, log_posteriors, offsets):
        """Log posteriors, float32 (n, 42) -> indexes of the 40 phonemes, int64 (n,)."""
        prior = self.prior.to(log_posteriors.device)
        transitions = self.transitions.to(log_posteriors.device)
        scores = log_posteriors[:, : len(prior)] - self.prior_scale * prior
        return viterbi(scores, self.transition_weight * transitions, offsets)

    def save(self, path):
        """Write it to a file, for `load`: then no training labels are needed."""
        save_checkpoint(path, {"config": {}, **vars(self)})

    @classmethod
    def load(cls, path):
        """A decoder from a file of `save`; None if there is no such file."""
        state = load_checkpoint(path)
        if state is None:
            return None
        del state["config"]
        decoder = cls.__new__(cls)
        vars(decoder).update(state)
        return decoder

    def tune(self, log_posteriors, labels, offsets, frames=200_000):
        """Set `prior_scale` and `transition_weight` to the pair that gets the most frames right.

        It is chosen on about `frames` frames at most, of utterances from all over the set.

        log_posteriors: float32 (n, 42). labels: integers (n,). offsets: (utterances + 1,).
        Returns indexes of phonemes, int64 (n,), that can be judged fairly against the labels: each
        half of the utterances is decoded with the pair that is best on the other half.
        """
        labels = labels.to(log_posteriors.device)
        pairs = list(itertools.product((0, 0.15, 0.3, 0.45), (0.25, 0.5, 0.75, 1, 1.5)))
        utterance_of_frame = torch.repeat_interleave(offsets.diff())

        def part(first, step):
            """Every step-th utterance from the first-th on: which frames, and their offsets."""
            inside = (utterance_of_frame % step == first).to(log_posteriors.device)
            lengths = offsets.diff()[first::step]
            return inside, torch.cat([offsets[:1], lengths.cumsum(0)])

        def decode(pair, inside, part_offsets):
            self.prior_scale, self.transition_weight = pair
            return self(log_posteriors[inside], part_offsets)

        # The halves are the even and the odd utterances. On some of each: how many frames does
        # each pair get right?
        halves = (0, 1) if len(offsets) > 2 else (0,)  # a single utterance cannot be halved
        step = 2 * max(1, round(len(labels) / frames))
        correct = {half: [] for half in halves}
        for half in halves:
            inside, part_offsets = part(half, step)
            for pair in pairs:
                predicted = decode(pair, inside, part_offsets)
                correct[half].append((predicted == labels[inside]).sum().item())

        path = torch.empty_like(labels, dtype=torch.int64)
        for half in halves:
            other_half = halves[-1 - half]
            pair = pairs[int(np.argmax(correct[other_half]))]
            inside, part_offsets = part(half, len(halves))
            path[inside] = decode(pair, inside, part_offsets)

        correct_in_all = np.sum(list(correct.values()), axis=0)
        self.prior_scale, self.transition_weight = pairs[int(np.argmax(correct_in_all))]
        return path


# ---- Checkpoint ----------------------------------------------------------------------------------

# keys that may change when a run is resumed, because the trained weights do not depend on them
KEYS_FREE_ON_RESUME = (
    "Name",
    "recipe",
    "test_warps",
    "smoothing",
    "data",
    "competition",
    "shorten",
    "wandb",
    "artifacts",
    "drive",
    "kaggle_submit",
    "ablations",
)

# {path: lock file} of the runs of this process; a file that nobody else refers to leaves it
_RUN_LOCKS = weakref.WeakValueDictionary()


def lock_run(folder, say=print):
    """Lock a run's folder for this process, until the returned file is closed or forgotten.

    Locking it again gives the same file. On a file system without locks a warning goes to `say`.
    Raises a RunError if another process holds the lock.
    """
    path = Path(folder).resolve() / ".lock"
    held = _RUN_LOCKS.get(path)
    if held is not None and not held.closed:
        return held
    lock = try_to_lock(path, say)
    if lock is None:
        raise RunError(
            f"{folder}: another notebook is training in this folder. Stop it (Kernel > Shut "
            "Down), or give this run another config['Name']."
        )
    _RUN_LOCKS[path] = lock
    return lock


def _is_readable(value):
    """Can `load_checkpoint` read this value once it is written?"""
    try:
        file = io.BytesIO()
        torch.save(value, file)
        file.seek(0)
        torch.load(file, weights_only=True)
    except Exception:  # torch and pickle raise a dozen types
        return False
    return True


def _as_plain_state(value, name):
    """A copy of a state in which numpy's numbers, at any depth, have become Python's.

    Raises a RunError that names the first value that could not be read again. name: of the state.
    """
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        plain = copy.copy(value)  # a state dict keeps its type and its attributes
        plain.clear()
        for key, each in value.items():
            plain_key = _as_plain_state(key, name)
            plain[plain_key] = _as_plain_state(each, f"{name}[{key!r}]")
        return plain
    if type(value) in (list, tuple):
        parts = [_as_plain_state(each, f"{name}[{i}]") for i, each in enumerate(value)]
        return type(value)(parts)
    known = (torch.Tensor, str, int, float, bool, type(None))
    if type(value) not in known and not _is_readable(value):
        raise RunError(
            f"the checkpoint was not written: {name} is {value!r:.100}, a {type(value).__name__}, "
            "and could not be read again. Make it a number, a text, a tensor, or a list or a dict "
            "of these. What was there before is unchanged."
        )
    return value


def save_checkpoint(path, state):
    """Write a dict of tensors, numbers and text atomically; numpy's numbers in it become Python's.

    What was written is read back before it replaces the old file. Raises a RunError if the disk is
    full, or if something cannot be read back; the old file stays as it was.
    """
    path = Path(path)
    state = _as_plain_state(state, path.stem)
    file = io.BytesIO()  # in memory first, because torch.save loses the error of a full disk
    torch.save(state, file)
    with atomic_write(path, file.tell()) as temporary:
        temporary.write_bytes(file.getbuffer())
        try:
            torch.load(temporary, map_location="cpu", weights_only=True)
        except Exception as error:  # torch and pickle raise a dozen types
            raise RunError(
                f"{path}: what was written could not be read back ({str(error)[:200]}). What was "
                "there before is unchanged. If it happens again, the disk is damaged."
            ) from error


def _set_by(config, key):
    """A remark on which of the SWITCHES may have set a key's value in a config; "" if none."""
    for (switch, value), changes in SWITCHES.items():
        is_on = config.get(switch) == value
        if is_on and key in changes and changes[key] == config.get(key):
            return f" (config[{switch!r}] = {value!r} may have set it)"
    return ""


def _config_differences(saved, config, free):
    """A line for each key whose value differs between two configs, except for the keys in `free`.

    A key that one of them does not have counts as in BEFORE.
    """
    lines = []
    for key in dict.fromkeys([*config, *saved]):  # each key once
        there = saved.get(key, BEFORE.get(key))
        now = config.get(key, BEFORE.get(key))
        if key in free or there == now:
            continue
        in_both = key in saved and key in config
        if not in_both and not there and not now:  # 0, False, None: off in either case
            continue
        line = f"{key}: {there!r} there{_set_by(saved, key)}, "
        line += f"{now!r} now{_set_by(config, key)}"
        if key not in saved:
            line += " (a key that was added since)"
        lines.append(line)
    return lines


def _check_same_config(path, saved, config, planned):
    """Raise a RunError that lists the differences if a run may not be resumed with this config.

    saved: the config in the checkpoint. The other arguments: see `load_checkpoint`.
    """
    free = KEYS_FREE_ON_RESUME
    if not planned and config["dropout_scale"] != "auto":
        free = (*free, "epochs")
    differences = _config_differences(saved, config, free)
    if not differences:
        return
    lines = [f"{path}: this run was started with another config:"]
    lines += [f"  {difference}" for difference in differences]
    lines.append("Set these back to resume it, or choose another config['Name'] for a fresh run.")
    if any(difference.startswith("epochs:") for difference in differences):
        lines.append(
            "(The schedule or dropout_scale 'auto' is planned for a fixed number of epochs.)"
        )
    raise RunError("\n".join(lines))


def load_checkpoint(path, config=None, planned=True):
    """The dict that `save_checkpoint` has written, read onto the CPU; None if there is no file.

    config: that of the run to be resumed. It must agree with the config in the checkpoint, except
    for KEYS_FREE_ON_RESUME, and for "epochs" unless the training is planned for their number.
    planned: is the schedule planned for the number of epochs? With dropout_scale "auto" the
    training always is.
    Raises a RunError if the file is damaged or no checkpoint, or if the configs do not agree.
    """
    path = Path(path)
    if not path.exists():
        return None
    try:
        with zipfile.ZipFile(path) as file:  # because torch.load does not compare the checksums
            if file.testzip() is not None:
                raise ValueError("wrong checksum")
        state = dict(torch.load(path, map_location="cpu", weights_only=True))
        saved = dict(state["config"])
        if config is not None and "history" not in state:
            raise ValueError("best weights only, which cannot be resumed")
    except Exception as error:  # torch and pickle raise a dozen types, none of them readable
        raise RunError(
            f"{path}: damaged, or not a checkpoint of this notebook ({type(error).__name__}). "
            "Restore a copy of it, or choose another config['Name'] for a fresh run."
        ) from None
    if config is not None:
        _check_same_config(path, saved, config, planned)
    return state


# the code in this module that makes the weights of a run, beside the notebook's functions
TRAINING_CODE = {
    "scale_dropout": scale_dropout,
    "Batches": Batches,
    "AudioDataset._batch": AudioDataset._batch,
    **READING_CODE,
}


def check_code(folder, state, code):
    """Raise a RunError that lists the differences if a checkpoint was made by other code.

    folder: of the run. state: the checkpoint. code: of `code_of`, the code as it is now.
    """
    differences = code_differences(state.get("code", {}), code)
    if not differences:
        return
    lines = [f"{folder}: this run was made by other code:"]
    lines += [f"  {difference}" for difference in differences]
    lines.append(
        "Undo the edit to go on with this run, or choose another config['Name'] for a fresh run."
    )
    raise RunError("\n".join(lines))


def save_best(run, row):
    """Write best.pt: the weights of a run, and all it takes to predict with them.

    row: of the history, for the epoch that has just ended.
    """
    data = run.train_loader.dataset
    state = {
        "model": weights_of(run.model),
        "config": run.config,
        "code": run.code,
        "columns": {"coefficients": data.coefficients, "convention": data.convention},
        "precision": str(run.precision).removeprefix("torch."),
        **row,
    }
    save_checkpoint(run.folder / "best.pt", state)


def load_best(folder, model):
    """Load the weights of the best epoch of the run in this folder into a model.

    Returns what else best.pt holds: the row of that epoch, the config, the code and the precision.
    Raises a RunError if there is no best.pt, or if its weights are those of another network.
    """
    best = load_checkpoint(Path(folder) / "best.pt")
    if best is None:
        raise RunError(f"{folder}: best.pt is not there: no epoch has ended yet, or it was deleted")
    try:
        load_weights(model, best.pop("model"))
    except RuntimeError as error:
        first_lines = [line.strip() for line in str(error).splitlines()[:4]]
        raise RunError(
            f"{folder}: its best weights are of another network than this one:\n  "
            + "\n  ".join(first_lines)
        ) from None
    return best


STATEFUL = ("model", "optimizer", "scheduler", "scaler")  # the parts of a run that training changes
COMPILED = "_orig_mod."  # what torch.compile adds to the names of a module's weights


def weights_of(model):
    """The state dict of a model, with the names that its tensors have without torch.compile."""
    return {name.replace(COMPILED, ""): tensor for name, tensor in model.state_dict().items()}


def load_weights(model, weights):
    """Load the weights that `weights_of` gave into a model, whatever part of it is compiled."""
    names = {name.replace(COMPILED, ""): name for name in model.state_dict()}
    model.load_state_dict({names.get(name, name): tensor for name, tensor in weights.items()})


def snapshot(run):
    """The state of a run's model, optimizer, scheduler and scaler, and of the random generators."""
    state = {name: getattr(run, name).state_dict() for name in STATEFUL}
    state["model"] = weights_of(run.model)
    state["random"] = torch.get_rng_state()
    state["random_cuda"] = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return state


def restore(state, run):
    """Put a `snapshot` back into a run, on whatever device it was taken.

    Raises a RunError if the run's parts are not of the kind that the snapshot was taken of.
    """
    for name in STATEFUL:
        try:
            if name == "model":
                load_weights(run.model, state["model"])
            elif state[name]:  # the scaler's is empty if it was not needed
                getattr(run, name).load_state_dict(state[name])
        except (RuntimeError, ValueError, KeyError) as error:
            raise RunError(
                f"the checkpoint has another {name} than this code makes "
                f"({str(error).splitlines()[0]}). Choose another config['Name'] for a fresh run."
            ) from None
    torch.set_rng_state(state["random"])
    if torch.cuda.is_available() and len(state["random_cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["random_cuda"])


def _learning_rates(optimizer_state):
    """The learning rate of each group of parameters in the state dict of an optimizer."""
    return [group["lr"] for group in optimizer_state["param_groups"]]


def _has_weights(model, weights):
    """Does a model have exactly these weights, of `weights_of`, now?"""
    now = weights_of(model)
    return all(now[name].cpu().equal(tensor) for name, tensor in weights.items())


def changes_by_hand(run, state):
    """A line for the user if somebody has set the weights or the learning rates of a run; else "".

    They are compared with the run's checkpoint, `state`; the best weights also are the run's own.
    If the last epoch was interrupted (`run.unsaved`), the training itself has changed them.
    """
    if run.unsaved:
        return ""
    changed = []
    if _learning_rates(run.optimizer.state_dict()) != _learning_rates(state["optimizer"]):
        changed.append("the learning rate")
    if not _has_weights(run.model, state["model"]):
        best = load_checkpoint(run.folder / "best.pt")
        if best is None or not _has_weights(run.model, best["model"]):
            changed.append("the weights")
    if not changed:
        return ""
    return f"{' and '.join(changed)} set by hand: not used, see section 7"


def check_parts(run):
    """Raise a RunError if a run's model or train_loader is of a kind that cannot be resumed."""
    parallel = (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel)
    if any(isinstance(layer, parallel) for layer in run.model.modules()):
        raise RunError(
            "a run uses one GPU: the copies that DataParallel makes of a network would not compute "
            f"in the run's precision, {run.precision}. Train the network itself, its `.module`."
        )
    if not isinstance(run.train_loader.sampler, Batches):
        raise RunError(
            f"run.train_loader has a {type(run.train_loader.sampler).__name__}; expected a loader "
            "of `make_loader`, whose order a resumed run repeats. To let rare phonemes count more, "
            "as with a WeightedRandomSampler, take a weighted loss: see the README."
        )


def start_or_resume(run, checkpoint):
    """Write the first checkpoint of a new run, or bring a run to where its checkpoint stands.

    The first one is written before the first epoch, so that a run that is killed in it keeps its
    precision and its wandb id.
    run: has `config`, `code` (of `code_of`), `folder`, `train_loader`, `precision`, and the parts
    in STATEFUL. It gets `history`, `wandb_id` and `unsaved` (has an epoch begun that is not saved
    yet?), and the state of its last epoch, or, if all epochs are done, the weights of the best one.
    checkpoint: of `load_checkpoint`; None for a new run.
    Returns a line for the user: a new run, or how many epochs are done.
    Raises a RunError if the run was trained on other data or by other code.
    """
    data = run.train_loader.dataset
    # the same data have the same one, wherever they lie
    fingerprint = {"frames": len(data), "sum of labels": int(data.labels.sum())}
    if checkpoint is None:
        checkpoint = {
            "config": run.config,
            "code": run.code,
            "data": fingerprint,
            "history": [],
            "wandb_id": secrets.token_hex(4),
            "precision": str(run.precision).removeprefix("torch."),
            **snapshot(run),
        }
        # of an earlier run, whose checkpoint was deleted
        (run.folder / "best.pt").unlink(missing_ok=True)
        save_checkpoint(run.folder / "checkpoint.pt", checkpoint)
    elif checkpoint["data"] != fingerprint:
        raise RunError(
            f"{run.folder} was trained on other data ({checkpoint['data']} there, {fingerprint} "
            "now): choose another config['Name'] for a fresh run."
        )
    check_code(run.folder, checkpoint, run.code)
    restore(checkpoint, run)
    run.unsaved = False
    run.wandb_id = checkpoint["wandb_id"]
    run.history = checkpoint["history"]

    done, epochs = len(run.history), run.config["epochs"]
    if done == 0:
        return f"{run.folder}: a new run"
    if done < epochs:
        return f"{run.folder}: {done} of {epochs} epochs are done, resuming"
    best = load_best(run.folder, run.model)
    return (
        f"{run.folder}: {done} of {epochs} epochs are done, nothing left to train; "
        f"the weights are those of the best one, epoch {best['epoch']}"
    )


# ---- Folders and runs ----------------------------------------------------------------------------

DRIVE = Path("/content/drive")  # where Colab mounts Google Drive


def tell(run, line):
    """Print a line that the user of a run must see, once, and add it to `run.message`."""
    if line not in run.message:
        run.message += line + "\n"
        print(line)


def runs_folder():
    """The folder of all runs: $HW1P2_RUNS, else /kaggle/working/runs on Kaggle, else runs/ here."""
    chosen = path_from_environment("HW1P2_RUNS")
    if chosen:
        return chosen
    if (KAGGLE / "working").is_dir():
        return KAGGLE / "working" / "runs"
    return Path("runs")


def cache_folder(runs=None):
    """The folder of packed data, corpora and wandb's uploads, which may be deleted at any time.

    It is runs/cache, but never inside /kaggle/working, which Kaggle saves with the notebook, nor on
    Google Drive. runs: the folder of all runs; None: `runs_folder()`.
    """
    runs = Path(runs or runs_folder())
    where = runs.resolve()
    if where.is_relative_to(KAGGLE / "working"):
        return KAGGLE / "temp" / "hw1p2-cache"
    if where.is_relative_to(DRIVE):
        return DRIVE.parent / "hw1p2-cache"
    return runs / "cache"


def load_secrets(*names, seconds=30):
    """Copy Colab's or Kaggle's secrets of these names into the environment, unless they are there.

    seconds: how long to wait for them. Without its browser window Colab never answers, nor does
    Kaggle without Internet.
    """
    missing = [name for name in names if not os.environ.get(name)]
    try:
        if "google.colab" in sys.modules:
            from google.colab import userdata

            get = userdata.get
        elif KAGGLE.is_dir():
            from kaggle_secrets import UserSecretsClient

            get = UserSecretsClient().get_secret
        else:
            return
    except Exception:  # there are no secrets, as in some of their older images
        return

    def fetch():
        for name in missing:
            with contextlib.suppress(Exception):  # no such secret, or no access to it
                os.environ[name] = get(name)

    thread = threading.Thread(target=fetch, daemon=True)
    thread.start()
    thread.join(seconds)


def _config_and_history(path):
    """The config and the history in a checkpoint, whose tensors are not read.

    Raises whatever torch and pickle raise if it is damaged.
    """
    state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    return state["config"], state["history"]


def read_runs(folder=None):
    """{name: (config, history)} of all runs and variants in a folder of runs.

    folder: None: `runs_folder()`. Runs whose checkpoint is damaged are left out, with a line.
    """
    folder = Path(folder or runs_folder())
    runs = {}
    for path in find_files(folder, "*/checkpoint.pt", "*/variants/*/checkpoint.pt"):
        name = path.parent.relative_to(folder).as_posix()
        try:
            runs[name] = _config_and_history(path)
        except Exception as error:  # torch and pickle raise a dozen types
            print(f"{path}: damaged, or not a checkpoint of this notebook ({type(error).__name__})")
    return runs


def compare_runs(runs):
    """A table of runs, the best one first: accuracies, epochs, and what differs in the configs.

    runs: {name: (config, history)}; runs without an epoch are left out. The accuracies (0-1) are
    those of the best epoch. The last columns are the keys in which the configs differ, except for
    KEYS_FREE_ON_RESUME.
    """
    rows, configs = {}, {}
    for name, (config, history) in runs.items():
        if not history:
            continue
        best = max(history, key=lambda row: row["val_acc"])
        rows[name] = {
            "val_acc": best["val_acc"],
            "train_acc": best["train_acc"],
            "in epoch": best["epoch"],
            "epochs": f"{len(history)} of {config['epochs']}",
        }
        configs[name] = config
    if not rows:
        return pd.DataFrame()
    table = pd.DataFrame(rows.values(), index=list(rows))
    values = pd.DataFrame(configs.values(), index=list(configs), dtype=object)
    ignored = (*KEYS_FREE_ON_RESUME, "epochs")
    for key in values:
        if key not in ignored and values[key].map(repr).nunique() > 1:
            table[key] = values[key]
    return table.sort_values("val_acc", ascending=False, kind="stable")


def _summary(results):
    """The numbers of a run's results by name; results: see `save_results`."""
    best = results.best
    summary = {f"best_{key}": best[key] for key in ("epoch", "val_acc", "val_loss", "train_acc")}
    for name, accuracy in results.accuracy.items():
        summary[f"val_acc, {name}"] = float(accuracy)
    if results.test_acc is not None:
        summary["test_acc"] = float(results.test_acc)
    return summary


def save_results(run, results):
    """Write the results of a run to its folder: results.json, confusion.csv, by_phoneme.csv.

    results: of the notebook's `evaluate_best`, with `test_acc`, which is None if it is not known.
    """
    confusion = pd.DataFrame(results.confusion, index=PHONEMES, columns=PHONEMES)
    texts = {
        "results.json": json.dumps(_summary(results), indent=1),
        "confusion.csv": confusion.to_csv(index_label="true"),
        "by_phoneme.csv": results.by_phoneme.to_csv(index=False),
    }
    for name, text in texts.items():
        with atomic_write(run.folder / name, len(text)) as temporary:
            temporary.write_text(text, "utf-8")


# ---- Google Drive --------------------------------------------------------------------------------

# between two copies to Drive, unless an epoch takes longer: a kill costs ten minutes at most
DRIVE_SECONDS = 9 * 60
DRIVE_SLOTS = ("checkpoint-a.zip", "checkpoint-b.zip")  # written in turn


def open_drive(run, subfolder):
    """Mount Google Drive on Colab and fetch the epochs of a run that are only there.

    subfolder: the path of the run below the folder of all runs.
    Returns the folder of the run on Drive; None if this is not Colab, which a line says.
    Raises a RunError if Drive cannot be mounted or read.
    """
    if "google.colab" not in sys.modules:
        tell(run, "config['drive'] is for Colab: it is ignored here")
        return None
    try:
        from google.colab import drive

        drive.mount(str(DRIVE))
    except Exception as error:  # Google's own types
        raise RunError(
            f"Google Drive could not be mounted ({type(error).__name__}: {str(error)[:200]}). Run "
            "the cell again and allow the access that Google asks for, or set config['drive'] = "
            "False."
        ) from error
    drive_folder = DRIVE / "MyDrive" / "hw1p2-runs" / subfolder
    epochs = restore_from_drive(run.folder, drive_folder)
    if epochs:
        tell(run, f"{run.folder}: fetched from Google Drive, {epochs} epoch(s)")
    return drive_folder


def session_warning(drive, practice):
    """A line for Colab, where files are lost when the session ends.

    drive, practice: is config["drive"] on, is this the practice corpus? If so, the line is empty.
    """
    if "google.colab" not in sys.modules or drive or practice:
        return ""
    return (
        "NOTHING HERE OUTLIVES THIS COLAB SESSION, which ends after 12 hours or earlier: "
        "config['drive'] = True keeps the checkpoints on Google Drive."
    )


def _epochs_in(archive):
    """How many epochs of a run are in an archive on Drive; -1 if it is missing or damaged."""
    try:
        with zipfile.ZipFile(archive) as file:
            is_intact = file.testzip() is None
            return int(file.comment) if is_intact else -1
    except FileNotFoundError:
        return -1
    except OSError:  # Drive is away: nothing is known about the archive
        raise
    except Exception:  # zipfile raises several types for damaged bytes
        return -1


def _epochs_here(folder):
    """How many epochs the checkpoint in a run's folder has; -1 if it is missing or damaged."""
    try:
        _, history = _config_and_history(folder / "checkpoint.pt")
    except Exception:  # torch and pickle raise a dozen types; `load_checkpoint` reports them
        return -1
    return len(history)


def copy_to_drive(folder, drive_folder, next_in=float("inf")):
    """Copy a run's checkpoint, best weights, decoder and CSV files to its folder on Google Drive.

    next_in: seconds until the next call. If that is early enough, this call copies nothing.
    What is replaced or deleted on Drive goes to its trash and uses up space. So two archives are
    overwritten in place, in turn: one of them is always whole.
    """
    slots = [drive_folder / name for name in DRIVE_SLOTS]
    copied_at = [slot.stat().st_mtime for slot in slots if zipfile.is_zipfile(slot)]
    due = max(copied_at, default=0) + DRIVE_SECONDS
    if time.time() + next_in < due:
        return
    try:
        drive_folder.mkdir(parents=True, exist_ok=True)
        older = min(slots, key=_epochs_in)
        with open(older, "wb") as file:
            with zipfile.ZipFile(file, "w") as archive:
                archive.comment = str(_epochs_here(folder)).encode()
                # the checkpoint comes last, see `restore_from_drive`
                for name in ("decoder.pt", "best.pt", "checkpoint.pt"):
                    if (folder / name).exists():
                        archive.write(folder / name, name)
            os.fsync(file.fileno())
        for path in folder.glob("*.csv"):
            shutil.copyfile(path, drive_folder / path.name)  # in place too
    except OSError as error:
        print(
            f"the copy on Google Drive could not be updated ({error}). The run in {folder} is not "
            "affected; the next epoch tries again, and so does the cell of section 9."
        )


def restore_from_drive(folder, drive_folder):
    """Fetch a run's files from Google Drive if more epochs are there than in `folder`.

    Returns how many epochs were fetched; 0 if none were. Raises a RunError if Drive cannot be read.
    """
    try:
        epochs_in = {name: _epochs_in(drive_folder / name) for name in DRIVE_SLOTS}
        newest = max(epochs_in, key=epochs_in.get)
        if epochs_in[newest] <= _epochs_here(folder):
            return 0
        with zipfile.ZipFile(drive_folder / newest) as archive:
            # The checkpoint comes last: after a kill before that, the next start fetches all again.
            for name in archive.namelist():
                content = archive.read(name)
                with atomic_write(folder / Path(name).name, len(content)) as temporary:
                    temporary.write_bytes(content)
    except OSError as error:
        raise RunError(
            f"{drive_folder} on Google Drive cannot be read ({error}): restart the session, or set "
            "config['drive'] = False."
        ) from error
    return epochs_in[newest]


# ---- wandb ---------------------------------------------------------------------------------------

LOGIN_SECONDS = 25  # how long wandb's login may take, once wandb is loaded
WANDB_SECONDS = 60  # how long it may take to start a wandb run, or to take its rows
UPLOAD_SECONDS = 100  # how long it may take for the last rows and the files
LAST_SECONDS = 20  # how long it may take to end after a failure
WANDB_MODES = {  # what $WANDB_MODE may be, and what it means
    "online": "online",
    "run": "online",
    "offline": "offline",
    "dryrun": "offline",
    "disabled": "disabled",
}
NO_KEY, NO_ANSWER = 3, 4  # exit statuses of WANDB_LOGIN
# Logs in as wandb itself does, and asks the server. It prints why that failed, unless there is no
# key or no answer. It ends by _exit, because wandb's own end may wait for the network.
WANDB_LOGIN = """
import os, sys, threading
status = 1
try:
    import wandb
    threading.Timer({seconds}, os._exit, [{no_answer}]).start()
    status = 0 if wandb.login(verify=True) else {no_key}
except Exception as error:
    faults = error.errors() if hasattr(error, "errors") else [{{"msg": str(error)}}]
    print(*(fault["msg"] for fault in faults), flush=True)
    if type(error).__name__ == "UsageError":
        status = {no_key}
os._exit(status)
"""


def _mode_in_environment(run):
    """The mode that $WANDB_MODE asks for, in whatever spelling; None if it is unset or unknown."""
    text = os.environ.pop("WANDB_MODE", "").strip(" \t\r\n'\"")
    mode = WANDB_MODES.get(text.lower())
    if mode:
        os.environ["WANDB_MODE"] = mode  # because wandb itself refuses any other spelling
    elif text:
        tell(run, f"WANDB_MODE={text} is ignored: expected online, offline or disabled")
    return mode


def _try_login(choice):
    """Try wandb's login in a process of its own. Returns its exit status, and why it failed.

    choice: "online", or "auto", which leaves the mode to wandb's own settings.
    Some versions of wandb wait for the network for ever, or ask for a key.
    """
    environment = dict(os.environ)
    if choice == "online":
        environment["WANDB_MODE"] = "online"
    login = WANDB_LOGIN.format(seconds=LOGIN_SECONDS, no_key=NO_KEY, no_answer=NO_ANSWER)
    try:
        process = subprocess.run(
            [sys.executable, "-c", login],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            timeout=LOGIN_SECONDS + 60,  # with the time to load Python and wandb
        )
        status, why = process.returncode, shorten(process.stdout)
    except subprocess.TimeoutExpired:
        status = NO_ANSWER
    if status == NO_KEY:
        why = "no key"
    elif status == NO_ANSWER:
        why = f"no answer in {LOGIN_SECONDS} s"
    return status, why


def wandb_mode(run):
    """The mode for `wandb.init` that config["wandb"] asks for; offline if wandb cannot log in.

    "auto" is $WANDB_MODE if it is set; else online if wandb finds a key, in whatever place.
    """
    choice = run.config["wandb"]
    mode = _mode_in_environment(run)
    if choice == "auto" and mode:
        choice = mode
    if choice in ("offline", "disabled"):
        return choice
    load_secrets("WANDB_API_KEY")
    status, why = _try_login(choice)
    if status == 0:
        return "online"
    if choice == "online" or status != NO_KEY:  # "auto" without a key is nothing to tell
        tell(run, f"wandb could not log in ({why}): this run is kept offline")
    return "offline"


_wandb_lock = threading.Lock()  # held by the thread that is calling wandb


def within(seconds, function, *arguments):
    """The result of function(*arguments), which talks to wandb; a TimeoutError if it takes longer.

    The call is made in a thread, one at a time. If the user interrupts the waiting, the call goes
    on: an import or a start that is cut off would leave wandb half made until the kernel restarts.
    """
    future, lock = Future(), _wandb_lock

    def call():
        with lock:
            if not future.set_running_or_notify_cancel():  # given up before its turn came
                return
            try:
                future.set_result(function(*arguments))
            except Exception as error:
                future.set_exception(error)
            except BaseException as error:  # a SystemExit is not meant for the notebook
                future.set_exception(RuntimeError(repr(error)))

    threading.Thread(target=call, daemon=True).start()
    end = time.monotonic() + seconds
    while not future.done() and time.monotonic() < end:
        wait([future], min(seconds, 0.5))  # in pieces: on Windows nothing interrupts it
    if not future.done():
        future.cancel()
        raise TimeoutError(f"no answer in {seconds} s")
    return future.result()


def _stop_wandb():
    """End wandb's process, whatever it waits for, and let wandb forget it, to start afresh.

    Otherwise the kernel, too, would wait for it at its end.
    """
    global _wandb_lock
    _wandb_lock = threading.Lock()  # the old one may never be free again
    with contextlib.suppress(Exception):
        import psutil  # comes with Jupyter

        for child in psutil.Process().children():
            if "wandb" in child.name():
                child.kill()
    with contextlib.suppress(Exception):
        within(10, sys.modules["wandb"].teardown)
    os.environ.pop("WANDB_SERVICE", None)  # the address of that process


class NoWandb:
    """Stands in for a wandb run: whatever is asked of it or called does nothing and cannot fail."""

    settings, url = SimpleNamespace(mode="disabled"), None

    def __init__(self):
        self.summary, self.config = {}, {}

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *arguments, **options: None


def _without_wandb():
    """`NoWandb`; and a disabled run of wandb's own, for a `wandb.log` in a cell of the user's."""
    with contextlib.suppress(Exception):
        within(10, functools.partial(sys.modules["wandb"].init, mode="disabled"))
    return NoWandb()


def _wandb_config(run):
    """The config, and what else wandb is to know of a run."""
    return {
        **run.config,
        **run.details,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _init_wandb(run, mode):
    """Start a wandb run for a run, in this mode."""
    import wandb  # here, because it takes a second, and benchmarks do without

    # where it prepares its uploads
    os.environ.setdefault("WANDB_DATA_DIR", str(cache_folder() / "wandb"))
    return wandb.init(
        mode=mode,
        id=run.wandb_id,
        group=run.group,
        dir=str(run.folder.resolve()),
        resume="allow" if mode == "online" else None,  # offline, some versions warn of it
        project=os.environ.get("WANDB_PROJECT") or "hw1p2",
        name=os.environ.get("WANDB_NAME") or run.config["Name"][:120],
        config=_wandb_config(run),
        settings=wandb.Settings(silent=True, console="off", init_timeout=WANDB_SECONDS // 2),
    )


def _reason(error):
    """An error as half a line of text."""
    return shorten(str(error) or type(error).__name__)


def _try_to_open(run, mode):
    """Set `run.wandb` to a new wandb run in this mode. Returns "", or why it did not start."""
    try:
        run.wandb = within(WANDB_SECONDS, _init_wandb, run, mode)
    except Exception as error:  # its service does not start, the server refuses: a dozen reasons
        _stop_wandb()
        return _reason(error)
    return ""


def _open_wandb(run, mode):
    """Set `run.wandb` to a new wandb run in this mode.

    If it does not start online, it is kept offline; if it does not start at all, it is a `NoWandb`.
    """
    if mode == "online":
        why = _try_to_open(run, "online")
        if "in use" in why:  # by a start that was stopped, and has ended by now
            why = _try_to_open(run, "online")
        elif "deleted" in why or "409" in why:
            run.wandb_id = secrets.token_hex(4)
            tell(
                run,
                f"wandb does not take this run ({why}): it goes on as the new run {run.wandb_id}",
            )
            why = _try_to_open(run, "online")
        if not why:
            return
        tell(run, f"wandb does not start this run ({why}): it is kept offline")
        mode = "offline"
    if mode == "offline":
        why = _try_to_open(run, "offline")
        if not why:
            return
        tell(run, f"wandb does not start ({why}): training goes on without it")
    run.wandb = _without_wandb()


def _take_open_run(run):
    """The wandb run that is open, if it is that of this run; else it is finished: None."""
    open_run = getattr(sys.modules.get("wandb"), "run", None)
    if open_run is None:
        return None
    is_ours = open_run.id == run.wandb_id
    if is_ours and open_run.config.get("wandb") == run.config["wandb"]:
        return open_run
    open_run.finish()
    return None


def _send_or_fall_back(run, seconds, send):
    """Call send(run), which talks to `run.wandb`; if it fails, again offline, or give wandb up.

    seconds: how long a call may take.
    """
    if isinstance(run.wandb, NoWandb):
        return
    try:
        within(seconds, send, run)
        return
    except Exception as error:
        why, timed_out = _reason(error), isinstance(error, TimeoutError)
    mode = run.wandb.settings.mode
    if not timed_out:  # perhaps it still takes what it was sent before
        with contextlib.suppress(Exception):
            within(LAST_SECONDS, run.wandb.finish)
    _stop_wandb()
    if mode == "online":
        tell(
            run,
            f"wandb fails ({why}): what is not uploaded yet is kept offline, and so is all that "
            "follows",
        )
        _open_wandb(run, "offline")
    else:
        tell(run, f"wandb fails ({why}): it goes on without it")
        run.wandb = _without_wandb()
    _send_or_fall_back(run, seconds, send)


def start_wandb(run, wandb_run=None):
    """Set `run.wandb` to the wandb run of a run, new or still open; send it config and history.

    run: has `config`, whose "wandb" is the mode (see `wandb_mode`), `folder`, `wandb_id`,
    `history`, `model`, `details` (a dict: what else to log with the config), `group` (a name, or
    None) and `message` (see `tell`). wandb_run: the one that a sweep has opened.
    The text of the model is kept in the folder and with the wandb run, as model_arch.txt. If the
    server refuses the id, `run.wandb_id` becomes a new one. $WANDB_PROJECT and $WANDB_NAME count.

    Nothing that wandb does stops the training: each call has a time limit. After one that fails
    the run goes on offline, where its rows are written again from the first one on; if that fails
    too, `run.wandb` becomes an object that does nothing. `run.message` tells it all.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / "model_arch.txt").write_text(str(run.model), "utf-8")
    run.wandb = wandb_run
    if wandb_run is None:
        try:
            run.wandb = within(UPLOAD_SECONDS, _take_open_run, run)
        except Exception as error:
            _stop_wandb()
            why = shorten(str(error))
            tell(run, f"the wandb run that was open could not be finished ({why})")
    if run.wandb is None:
        _open_wandb(run, wandb_mode(run))
    mode = run.wandb.settings.mode
    address = f": {run.wandb.url}" if mode == "online" else ""
    tell(run, f"wandb is {mode}{address}")
    _send_or_fall_back(run, WANDB_SECONDS, _send_config)
    log_history(run)


def _send_config(run):
    """Send what is new in the config, and the text of the model."""
    known, new = run.wandb.config, {}
    for key, value in _wandb_config(run).items():
        if key not in known or known[key] != value:  # what a sweep has set may not be set again
            new[key] = value
    known.update(new, allow_val_change=True)
    # in wandb's own folder, from which it is uploaded without a link to it
    architecture = Path(run.wandb.dir, "model_arch.txt")
    architecture.write_text(str(run.model), "utf-8")
    run.wandb.save(str(architecture), base_path=run.wandb.dir, policy="now")


def _send_rows(run):
    """Send the rows that wandb does not have yet, with the epochs as x axis; and the best accuracy.

    The summary of the wandb run says how many were sent, as `epochs_sent`; "epoch" may be the
    user's own.
    """
    if not run.history:
        return
    for name in run.history[-1]:
        if name != "epoch":
            run.wandb.define_metric(name, step_metric="epoch")
    sent = run.wandb.summary.get("epochs_sent") or 0
    for row in run.history:
        if row["epoch"] > sent:
            run.wandb.log(row)
            run.wandb.summary["epochs_sent"] = row["epoch"]
    run.wandb.summary["best_val_acc"] = max(row.get("val_acc", 0) for row in run.history)


def log_history(run):
    """Write `run.history`, dicts with "epoch", to history.csv, and send wandb what is new in it."""
    path = run.folder / "history.csv"
    if run.history:
        with atomic_write(path, 200 * len(run.history)) as temporary:
            pd.DataFrame(run.history).to_csv(temporary, index=False)
    else:
        path.unlink(missing_ok=True)  # of an earlier run, whose checkpoint was deleted
    _send_or_fall_back(run, WANDB_SECONDS, _send_rows)


def _send_results(run, results, submission):
    """Send the results: summary, confusion matrix, accuracy of each phoneme, files as artifact."""
    import wandb

    run.wandb.summary.update(_summary(results))
    columns = ["Actual", "Predicted", "nPredictions"]
    counts = []
    for i, j in itertools.product(range(40), repeat=2):
        counts.append([PHONEMES[i], PHONEMES[j], int(results.confusion[i, j])])
    chart = wandb.plot_table(
        "wandb/confusion_matrix/v1",
        wandb.Table(columns=columns, data=counts),
        {name: name for name in columns},
        {"title": "Confusion"},
    )
    by_phoneme = wandb.Table(dataframe=results.by_phoneme)
    run.wandb.log({"confusion_matrix": chart, "by_phoneme": by_phoneme})
    if run.config["artifacts"]:
        # its name may have 128 letters, digits, dots, dashes and underscores
        name = re.sub(r"[^\w.-]", "-", run.config["Name"], flags=re.ASCII)[:100]
        artifact = wandb.Artifact(f"{name}-{run.wandb_id}", "result")
        for path in (submission, run.folder / "best.pt"):
            artifact.add_file(str(path), policy="immutable")  # without a copy of its own
        run.wandb.log_artifact(artifact)


def finish_wandb(run, results=None, submission=None):
    """Finish the wandb run of a run, after sending it the last rows, and the results, if any.

    results: see `save_results`. submission: the path of the CSV, for the artifact.
    If it is offline, a line tells the command that uploads it later.
    """

    def send(run):
        _send_rows(run)
        if results is not None:
            _send_results(run, results, submission)
        run.wandb.finish()

    _send_or_fall_back(run, UPLOAD_SECONDS, send)
    if run.wandb.settings.mode == "offline":
        folder = Path(run.wandb.dir).parent
        if folder.is_relative_to(Path.cwd()):
            folder = folder.relative_to(Path.cwd())
        tell(run, f"To upload the curves later: wandb sync {shlex.quote(str(folder))}")


# ---- Submission ----------------------------------------------------------------------------------


def write_submission(path, predictions):
    """Write Kaggle's CSV: the header `id,label`, then a line for each test frame, ids from 0.

    predictions: str array (n,), the phoneme of each frame, in order.
    """
    table = pd.DataFrame({"label": predictions})
    with atomic_write(path, 12 * len(predictions)) as temporary:
        table.to_csv(temporary, index_label="id", lineterminator="\n")


def _read_rows(path):
    """Yield the rows of a CSV file with the header id,label, as lists of texts; no blank lines.

    Raises a DataError if the file cannot be read or has another header.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(file)
            header = ",".join(next(rows, []))
            if header.lower() != "id,label":  # older editions have Id,Label
                raise DataError(f"{path}: the header is {header[:200]!r}; expected id,label")
            yield from filter(None, rows)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: not a CSV file ({error}); expected lines of id,label") from None


def read_submission(path, frames=None):
    """The labels in a CSV as Kaggle takes it: str array (frames,).

    frames: how many there must be; None: any number.
    Raises a DataError if the header, the number of rows, an id or a label is not as expected.
    """
    phonemes = {phoneme: phoneme for phoneme in PHONEMES}  # one object for each, not for each row
    labels = []
    for i, row in enumerate(_read_rows(path)):
        if len(row) != 2 or row[0] != str(i) or row[1] not in phonemes:
            raise DataError(
                f"{path}: line {i + 2} is {','.join(row)[:200]!r}; expected the id {i} and the "
                "name of a phoneme, such as AA or [SIL]"
            )
        labels.append(phonemes[row[1]])
    if frames is not None and len(labels) != frames:
        raise DataError(
            f"{path}: {len(labels):,} rows; expected {frames:,}, one for each frame of test-clean"
        )
    return np.array(labels, str)


def check_sample_submission(data_folder, frames):
    """Compare the ids in the sample submission that lies with the data, if any, with 0, 1, 2, ...

    It lies in the data folder, in a folder of that one, or, as on Kaggle, beside it.
    frames: of the test partition.
    Raises a DataError that names the file if it, or the test partition, belongs to something else.
    """
    data_folder = Path(data_folder)
    samples = find_files(data_folder, "*sample_submission.csv", "*/*sample_submission.csv")
    if not (data_folder / "answers.csv").exists():  # what lies beside a corpus made here is not its
        samples += find_files(data_folder.parent, "sample_submission.csv")
    for path in samples:
        if not path.is_file():  # a folder, a link to nowhere
            continue
        ids = [row[0] for row in _read_rows(path)]
        known = set(ids)  # in whatever order
        if len(ids) != frames or not all(str(i) in known for i in range(frames)):
            raise DataError(
                f"{path}: the sample submission has {len(ids):,} rows, ids {', '.join(ids[:3])} "
                f"...; expected {frames:,}, one for each frame of {data_folder / 'test-clean'}, "
                "ids from 0. If it belongs to something else, move it away."
            )


def competition_of(data_folder, competition):
    """Kaggle's name of the edition to submit to: `competition`, which is the config's.

    If that is the default, and the data were attached or downloaded from another edition, it is
    the name of that one.
    """
    default = next(iter(EDITIONS))
    if competition != default:
        return competition
    parts = Path(data_folder).parts
    if "competitions" in parts[:-1]:  # a folder of Kaggle's, and of kagglehub's
        return parts[parts.index("competitions") + 1]
    for name, folder in EDITIONS.items():
        if name in parts or folder in parts:
            return name
    return competition


def submission_message(run):
    """The message of a submission: the path of the wandb run if it is online, else the run's Name.

    The course's submission code reads it, in the form HW1P2|WB=entity/project/run_id.
    """
    if run.wandb.settings.mode == "online":
        return f"HW1P2|WB={run.wandb.path}"
    return run.config["Name"]


def hand_in_hint(run, submission, competition):
    """What it takes to hand a run in: the CSV, the message, the course's code, the wandb run."""
    lines = [
        f"To hand it in: submit {submission} at kaggle.com/competitions/{competition}",
        f"with the message {submission_message(run)}",
        "The course's submission code goes below this cell: it takes `model`, which has the best "
        "weights.",
    ]
    if run.wandb.settings.mode != "online":
        lines.append(
            "It looks for the wandb run on the server: upload it first; then the message is "
            "HW1P2|WB=entity/project/run_id."
        )
    return "\n".join(lines)


def kaggle_causes(competition):
    """Why Kaggle may refuse a download or a submission, and what to do."""
    return (
        "The usual causes: the rules are not accepted yet (press Join on "
        f"kaggle.com/competitions/{competition}), or the token is missing or has expired: create "
        "one in your account's settings on kaggle.com, and put it into ~/.kaggle/, the environment "
        "(KAGGLE_API_TOKEN) or Colab's or Kaggle's secrets; never into a cell." + internet_hint()
    )


def _kaggle_command():
    """The official `kaggle` command, as a list: of this Python's environment, else of the PATH."""
    beside_python = os.path.dirname(sys.executable)  # the environment need not be activated
    command = shutil.which("kaggle", path=beside_python) or shutil.which("kaggle")
    if command:
        return [command]
    if _can_import("kaggle"):  # its command is elsewhere, as with pip install --user
        return [sys.executable, "-m", "kaggle"]
    raise RunError("the kaggle command is not installed: pip install kaggle")


def submit(path, message, competition):
    """Submit a CSV with the official `kaggle` command. Returns what the command printed.

    Raises a RunError that says what went wrong.
    """
    load_secrets("KAGGLE_API_TOKEN", "KAGGLE_USERNAME", "KAGGLE_KEY")
    arguments = ["-c", competition, "-f", str(path), "-m", message]
    command = [*_kaggle_command(), "competitions", "submit", *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    output = (result.stdout + result.stderr).strip()
    # of a refusal, some versions print one of these and exit with 0
    was_refused = re.search(r"\b40[13]\b|Could not submit", output)
    if result.returncode or was_refused:
        raise RunError(
            f"{path} could not be submitted: {last_words(output)}\n{kaggle_causes(competition)}"
        )
    return output


# ---- Corpora: speech in the course's layout, for those who cannot have the course's data ---------

SAMPLE_RATE = 16000  # Hz, LibriSpeech's
WINDOW, HOP = 400, 160  # samples: windows of 25 ms every 10 ms


def import_torchaudio():
    """Import torchaudio and return it.

    Raises a RunError that says what to install if it is missing or made for another torch.
    """
    try:
        import torchaudio.compliance.kaldi
    except (ImportError, OSError) as error:  # OSError: "undefined symbol", made for another torch
        # 2.11 is the last version, and fits torch up to 2.14
        minor = min(int(torch.__version__.split(".")[1]), 11)
        raise RunError(
            "torchaudio, which makes the MFCCs of a corpus, cannot be imported beside torch "
            f'{torch.__version__} ({shorten(error)}): pip install "torchaudio==2.{minor}.*", and '
            f"restart the kernel.{internet_hint()}"
        ) from error
    return torchaudio


@functools.cache
def _resampler(rate):
    return import_torchaudio().transforms.Resample(rate, SAMPLE_RATE)


def speech_features(audio, rate):
    """MFCCs of an utterance as the course has them, HTK's: float32 (T, 28), a frame every 10 ms.

    audio: float32 (samples,) between -1 and 1, at least one window of 25 ms. rate: in Hz.
    At 16 kHz, frame t is made of the samples 160 t to 160 t + 399. The columns are c1 ... c27,
    liftered, then c0 (see `columns_of`). As in the course's features, samples count as 16-bit
    integers, and there is no pre-emphasis.
    """
    samples = _resampler(rate)(torch.from_numpy(audio)) * 2**15
    mfcc = import_torchaudio().compliance.kaldi.mfcc(
        samples[None],
        num_ceps=28,
        num_mel_bins=28,
        low_freq=0,
        high_freq=8000,
        htk_compat=True,
        use_energy=False,
        cepstral_lifter=LIFTER,
        window_type="hamming",
        preemphasis_coefficient=0,
        dither=0,
    )
    return mfcc.numpy()


def label_frames(phones, frames):
    """The phoneme at the centre of each frame's window, "<U5" (frames,); silence if there is none.

    phones: (phoneme, start, end) in seconds, in the order of their starts. Where two of them
    overlap, the later one counts.
    """
    centres = (np.arange(frames) * HOP + WINDOW / 2) / SAMPLE_RATE
    labels = np.full(frames, "[SIL]", "<U5")
    for phoneme, start, end in phones:
        first, after_last = np.searchsorted(centres, [start, end])
        labels[first:after_last] = phoneme
    return labels


def _write_utterance(folder, name, audio, rate, phones):
    """Write the features and the labels of an utterance into the folder of a partition."""
    mfcc = speech_features(audio, rate)
    transcript = np.array(["[SOS]", *label_frames(phones, len(mfcc)), "[EOS]"])
    np.save(folder / "mfcc" / f"{name}.npy", mfcc)
    np.save(folder / "transcript" / f"{name}.npy", transcript)


@contextlib.contextmanager
def _new_corpus(root):
    """Give the folder ROOT.partial with the course's folders, and what an earlier call left there.

    If the block succeeds, the transcripts of test become answers.csv, and the folder becomes
    `root`.
    """
    if root.exists():
        raise FileExistsError(f"{root} exists already: delete it to have it made again")
    partial = root.with_name(root.name + ".partial")
    for name, kind in itertools.product(PARTITIONS, KINDS):
        (partial / name / kind).mkdir(parents=True, exist_ok=True)
    try:
        yield partial
    except OSError as error:
        free = shutil.disk_usage(partial).free / 1e6
        raise RunError(
            f"{root} could not be made ({error}): {free:,.0f} MB are free. Free some space and run "
            "again."
        ) from error
    for name in PARTITIONS:
        if not _npy_files(partial / name / "mfcc")[0]:
            lines = [f"{partial}: no utterances for {name}; expected some in each partition"]
            left_out = partial / "left-out.txt"  # only in a corpus of recordings
            if left_out.exists():
                reasons = left_out.read_text().splitlines()
                lines += first_ten([f"left out: {reason}" for reason in reasons])
            raise DataError("\n".join(lines))
    transcripts = partial / "test-clean" / "transcript"
    if not (partial / "answers.csv").exists():
        labels = [np.load(transcripts / name)[1:-1] for name in _npy_files(transcripts)[0]]
        write_submission(partial / "answers.csv", np.concatenate(labels))
    shutil.rmtree(transcripts)
    partial.rename(root)


# ---- Practice corpus -----------------------------------------------------------------------------

# Who, did what, where, when: one of each makes a sentence (our own words).
GRAMMAR = [
    [
        "the baker",
        "my youngest cousin",
        "a cheerful farmer",
        "both sailors",
        "three noisy boys",
        "the shy girl in yellow",
        "her uncle George",
        "an author from Asia",
        "a wise judge",
    ],
    [
        "mended a wooden chair",
        "cooked a huge pot of soup",
        "counted eleven white sheep",
        "watched a long television show",
        "measured the depth of the pool",
        "shared a warm blanket",
        "hung a bright picture",
        "threw the ball too far",
        "carried a basket of oranges",
    ],
    [
        "in the kitchen",
        "near the old bridge",
        "at the railway station",
        "under a maple tree",
        "around the corner",
        "above the valley",
        "down by the harbor",
        "on the tennis court",
        "in our backyard",
    ],
    [
        "before breakfast",
        "on Thursday afternoon",
        "because the bus was late",
        "when the bell rang",
        "although it was raining",
        "in less than an hour",
        "with great pleasure",
        "as usual",
        "with both eyes shut",
    ],
]
# The first utterance of each partition has all 39 phones, so that no class is missing even in the
# smallest corpus.
PANGRAMS = [
    (
        "They knew that noisy young boy very well: he put his hot yellow jacket on the chair, "
        "then sang both songs about measuring fish, while I paused for a good word with her "
        "father."
    ),
    (
        "My father thought the usual choice was good: wash the huge brown jar, take each thing "
        "out, then enjoy a bowl of very hot yams with sugar and pears."
    ),
    (
        "Our loyal judge took a vision of the yacht shop to church; there both birds sang, you "
        "gave them all a clean white hat, and I heard my father laugh out loud at the zoo."
    ),
]
# eSpeak NG's variants of en-us that sound like people, for train, dev, test. None of them has
# `breath`, which comes out different each time.
VOICES = [
    (
        "Alex Andrea Andy Annie AnxiousAndy Denis Diogo Gene Henrique Hugo Jacky Lee Mario "
        "Michael Nguyen adam anika aunty belinda benjamin boris ed edward f1 grandma grandpa "
        "gustave ian iven iven3 klatt klatt2 klatt4 klatt6 m1 m3 m5 m7 marcelo max michel "
        "norbert pablo paul quincy rob steph steph3 travis"
    ).split(),
    "Gene2 Mike david f4 iven2 john klatt3 m2 m6 pedro steph2".split(),
    "antonio edward2 iven4 klatt5 linda m4 m8 miguel mike2 robert shelby".split(),
]
# ARPAbet phone: eSpeak NG's mnemonics for it in American English. T is also the flap of "city" (t#)
# and the glottal stop of "button" (?), as in CMUdict; ";" is the glide that links a high vowel to
# the next vowel, and belongs to the first. Two phones share the interval half and half: an
# r-coloured vowel is the vowel and R.
MNEMONICS = {
    "AA": "A: 0",
    "AE": "a aa",
    "AH": "V @ @2 @- a#",
    "AO": "O O2 O:",
    "AW": "aU",
    "AY": "aI",
    "B": "b",
    "CH": "tS",
    "D": "d",
    "DH": "D",
    "EH": "E",
    "ER": "3 3:",
    "EY": "eI",
    "F": "f",
    "G": "g",
    "HH": "h",
    "IH": "I I2 I#",
    "IY": "i i: ;",
    "JH": "dZ",
    "K": "k",
    "L": "l",
    "M": "m m-",
    "N": "n n-",
    "NG": "N",
    "OW": "oU",
    "OY": "OI",
    "P": "p",
    "R": "r r-",
    "S": "s",
    "SH": "S",
    "T": "t t2 t# ?",
    "TH": "T",
    "UH": "U",
    "UW": "u:",
    "V": "v",
    "W": "w",
    "Y": "j",
    "Z": "z",
    "ZH": "Z",
    "AA+R": "A@",
    "AH+L": "@L",
    "AO+R": "O@ o@",
    "AW+ER": "aU@",
    "AY+AH": "aI@",
    "AY+ER": "aI3",
    "EH+R": "e@",
    "IH+R": "i@3",
    "IY+AH": "i@",
    "UH+R": "U@",
}
ARPABET = {name: phone for phone, names in MNEMONICS.items() for name in names.split()}

ESPEAK_RATE = 22050  # Hz
# constants of eSpeak NG's speak_lib.h
_AUDIO_OUTPUT_SYNCHRONOUS = 2
_INITIALIZE_PHONEME_EVENTS = 0x0001
_INITIALIZE_DONT_EXIT = 0x8000  # return an error instead
_CHARS_UTF8 = 1
_PARAMETER_RATE, _PARAMETER_PITCH = 1, 3
_EVENT_LIST_TERMINATED, _EVENT_PHONEME = 0, 7
_ESPEAK = threading.Lock()  # it has one state for the whole process


class _Event(ctypes.Structure):
    """espeak_EVENT of speak_lib.h; of its union, the text that we need."""

    _fields_ = [
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("phoneme", ctypes.c_char * 8),
    ]


_CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event)
)


def _load_espeak():
    """eSpeak NG's library, and the path of its data. Raises ImportError if it does not load."""
    try:
        import espeakng_loader  # here, because only the practice corpus needs it

        library = ctypes.CDLL(espeakng_loader.get_library_path())
        return library, espeakng_loader.get_data_path()
    except (ImportError, RuntimeError, OSError) as error:
        raise ImportError(
            "eSpeak NG, which speaks the practice corpus, does not load "
            f"({error}): pip install espeakng-loader.{internet_hint()}"
        ) from error


def _unload_espeak(espeak):
    """Unload eSpeak NG's library.

    Its noise and flutter go on from call to call, in variables that no function resets, but the
    sound of an utterance must not depend on what the process said before.
    """
    espeak.espeak_Terminate()
    if os.name == "nt":
        _ctypes.FreeLibrary(espeak._handle)
    else:
        _ctypes.dlclose(espeak._handle)


def _synthesize(text, voice, rate, pitch):
    """What eSpeak says: int16 chunks of audio, and (first sample, mnemonic) of each phoneme."""
    chunks, events = [], []

    @_CALLBACK
    def collect(samples, count, event):
        if samples and count > 0:
            chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        i = 0
        while event[i].type != _EVENT_LIST_TERMINATED:
            if event[i].type == _EVENT_PHONEME:
                mnemonic = event[i].phoneme.decode().lstrip("',%=")  # without stress
                events.append((event[i].sample, mnemonic))
            i += 1
        return 0  # go on

    with _ESPEAK:
        espeak, data = _load_espeak()
        try:
            if voice and not Path(data, "voices", "!v", voice).is_file():
                # eSpeak would take its plain voice
                raise DataError(
                    f"eSpeak NG has no voice en-us+{voice}: expected a variant in {data}/voices/!v"
                )
            options = _INITIALIZE_PHONEME_EVENTS | _INITIALIZE_DONT_EXIT
            found_rate = espeak.espeak_Initialize(
                _AUDIO_OUTPUT_SYNCHRONOUS, 0, os.fsencode(data), options
            )
            if found_rate != ESPEAK_RATE:
                raise ImportError(
                    "eSpeak NG does not find its data: reinstall espeakng-loader with pip"
                )
            espeak.espeak_SetSynthCallback(collect)
            espeak.espeak_SetVoiceByName(f"en-us+{voice}".rstrip("+").encode())
            espeak.espeak_SetParameter(_PARAMETER_RATE, rate, 0)
            espeak.espeak_SetParameter(_PARAMETER_PITCH, pitch, 0)
            encoded = text.encode()
            size = ctypes.c_size_t(len(encoded) + 1)
            espeak.espeak_Synth(encoded, size, 0, 0, 0, _CHARS_UTF8, None, None)
        finally:
            _unload_espeak(espeak)
    return chunks, events


def speak(text, voice="", rate=175, pitch=50):
    """Speak a text with eSpeak NG.

    voice: a variant of en-us. rate: in words per minute. pitch: 0 to 99.
    Returns (audio, phones): float32 (samples,) at 22,050 Hz, and a list of (phoneme, start, end) in
    seconds, ARPAbet or [SIL].
    Raises ImportError if eSpeak NG does not load, DataError for an unknown voice or phoneme.
    """
    # in a thread, because the main thread's Ctrl-C would be lost inside eSpeak's callback
    with ThreadPoolExecutor(1) as thread:
        chunks, events = thread.submit(_synthesize, text, voice, rate, pitch).result()
    audio = np.concatenate(chunks).astype(np.float32) / 2**15
    starts = [start for start, _ in events]
    ends = [*starts[1:], len(audio)]
    phones = []
    for (start, mnemonic), end in zip(events, ends):
        if mnemonic.startswith("_"):  # a pause: _ and _: and _! and so on
            names = ["[SIL]"]
        elif mnemonic in ARPABET:
            names = ARPABET[mnemonic].split("+")
        else:
            raise DataError(
                f"eSpeak NG's phoneme {mnemonic!r} has no ARPAbet phone; known: {list(ARPABET)}"
            )
        boundaries = np.linspace(start, end, len(names) + 1) / ESPEAK_RATE
        phones += zip(names, boundaries, boundaries[1:])
    return audio, phones


def practice_utterance(partition, index, seed=23):
    """What utterance `index` of a partition (0 train, 1 dev, 2 test) says, and how.

    It depends on the arguments only. Partitions share neither sentences nor voices.
    Returns (text, voice, rate, pitch), the arguments of `speak`.
    """
    sentences = np.random.default_rng(seed).permutation(9**4)
    of_partition = sentences[partition::3]
    number = of_partition[index % len(of_partition)]
    choices = np.unravel_index(number, [9] * 4)
    text = " ".join(entries[i] for entries, i in zip(GRAMMAR, choices))
    text = text[0].upper() + text[1:] + "."
    if index == 0:
        text = PANGRAMS[partition]
    voices = VOICES[partition]
    rng = np.random.default_rng((seed, partition, index))
    rate, pitch = int(rng.integers(140, 200)), int(rng.integers(35, 66))
    return text, voices[index % len(voices)], rate, pitch


def _practice_recording(partition, index, seed):
    """The audio and the phones of a `practice_utterance`, between two silences and in noise."""
    audio, phones = speak(*practice_utterance(partition, index, seed))
    rng = np.random.default_rng((seed, partition, index, 1))
    # the silences, because eSpeak starts at once
    before, after = (rng.uniform(1 / 8, 1 / 2, 2) * ESPEAK_RATE).astype(int)
    audio = np.pad(audio, (before, after))
    shift = before / ESPEAK_RATE
    phones = [(phoneme, start + shift, end + shift) for phoneme, start, end in phones]
    noise = rng.standard_normal(len(audio), dtype=np.float32)
    decibels = rng.uniform(20, 40)  # of the noise below the speech
    audio += noise * np.float32(audio.std() * 10 ** (-decibels / 20))
    return audio, phones


def make_practice_corpus(root, utterances=(250, 52, 52), seed=23):
    """Make a corpus in the course's layout, spoken by eSpeak NG: the same seed, the same bytes.

    root: its folder, which appears when everything is written. ROOT/answers.csv (`id,label`) has
    the phonemes of the test frames.
    utterances: of train, dev and test, at least 1 each; the defaults make 20 minutes of speech.
    Raises FileExistsError if `root` exists, ImportError without eSpeak NG, RunError if the disk is
    full.
    """
    if len(utterances) != 3 or min(utterances) < 1:
        raise DataError(f"utterances {utterances}: expected three numbers >= 1")
    import_torchaudio()
    shutil.rmtree(f"{root}.partial", ignore_errors=True)
    with _new_corpus(Path(root)) as partial:
        for partition, name in enumerate(PARTITIONS):
            for i in range(utterances[partition]):
                audio, phones = _practice_recording(partition, i, seed)
                _write_utterance(partial / name, f"{i:06d}", audio, ESPEAK_RATE, phones)
        written = [len(_npy_files(partial / name / "mfcc")[0]) for name in PARTITIONS]
        if written != list(utterances):
            raise RunError(
                f"{partial} was changed by another process while it was made. Run again."
            )


# ---- LibriSpeech ---------------------------------------------------------------------------------

# the partitions of the rows, in turn, if the name of their file does not tell
DEALT_OUT = ("train-clean-100", "train-clean-100", "train-clean-100", "dev-clean", "test-clean")


def _has_rows(path):
    """Has this parquet file rows? True if it cannot be read, which is reported later."""
    import pyarrow.parquet  # comes with datasets

    with contextlib.suppress(OSError, pyarrow.ArrowException):
        return pyarrow.parquet.read_metadata(path).num_rows > 0
    return True


def _local_sources(path):
    """`_sources` for a local .parquet file or a folder of them."""
    files = find_files(path, "**/*.parquet") if path.is_dir() else [path]
    files = [file for file in files if _has_rows(file)]
    if not files:
        raise DataError(f"{path}: there are no .parquet files in it, or none that has rows")
    sources = []
    for file in files:
        start = file.name.replace("_", "-")
        partitions = [name for name in PARTITIONS if start.startswith(name)]
        arguments = {"path": "parquet", "data_files": str(file), "split": "train"}
        sources.append((str(file), arguments, partitions or DEALT_OUT))
    return sources


def _sources(source, revision):
    """What a corpus is made from, a tuple for each local file or each split of a dataset.

    source, revision: see `make_librispeech_corpus`.
    The tuple is (name, arguments of `load_dataset`, partitions to which the rows go in turn).
    """
    if Path(source).exists():
        return _local_sources(Path(source))
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        raise DataError(
            f"{source}: no such file or folder; expected .parquet, or a dataset's name on the hub"
        )
    if revision is None and source == LIBRISPEECH:
        revision = LIBRISPEECH_REVISION
    sources = []
    for name in PARTITIONS:
        arguments = {"path": source, "split": name.replace("-", "_"), "revision": revision}
        sources.append((f"{source}, {name}", arguments, [name]))
    return sources


def _phones_of(row):
    """The phones of a row, a list of dicts: phoneme, start, end. Empty if there is no alignment."""
    phones = row["phonemes"] or []
    if isinstance(phones, dict):  # a list of structs in older versions of datasets
        phones = [dict(zip(phones, values)) for values in zip(*phones.values())]
    times = [(phone["start"], phone["end"]) for phone in phones]
    if not np.isfinite(np.array(times, float)).all():
        raise DataError(f"{row['id']}: a phone without start or end; expected both, in seconds")
    return phones


def _audio_of(row):
    """The audio of a row, float32 (samples,), and its rate in Hz."""
    import soundfile

    try:
        audio, rate = soundfile.read(io.BytesIO(row["audio"]["bytes"]), dtype="float32")
    except (RuntimeError, TypeError) as error:
        raise DataError(
            f"{row['id']}: the audio cannot be decoded ({error}); expected FLAC"
        ) from None
    if audio.ndim != 1:
        raise DataError(f"{row['id']}: the audio has {audio.shape[1]} channels; expected one")
    shortest = math.ceil(WINDOW * rate / SAMPLE_RATE)
    if len(audio) < shortest:
        raise DataError(
            f"{row['id']}: the audio has {len(audio)} samples at {rate} Hz, too few for a frame; "
            f"expected at least {shortest}, 25 ms"
        )
    return audio, rate


def _convert_row(job):
    """Write an utterance into the folder of its partition; job: (folder, row).

    Returns (id, number of unknown words, None), or (id, 0, the reason) if it is left out.
    """
    folder, row = job
    phones = _phones_of(row)
    if not phones:
        return row["id"], 0, "no alignment"
    audio, rate = _audio_of(row)
    missing = len(audio) / rate - max(phone["end"] for phone in phones)
    if abs(missing) > 0.5:
        side = "before" if missing > 0 else "after"
        return row["id"], 0, f"its phones end {abs(missing):.2f} s {side} the audio"
    spans = []
    for phone in sorted(phones, key=lambda phone: phone["start"]):
        phoneme, start, end = phone["phoneme"], phone["start"], phone["end"]
        if phoneme in ("sil", "sp", "spn", "", None):
            symbol = "[SIL]"
        else:
            symbol = phoneme.rstrip("012")  # without the stress
        if symbol not in _INDEX:
            raise DataError(
                f"{row['id']}: the phone {phoneme!r} at {start:.2f} s is unknown; expected "
                f"{' '.join(PHONEMES[1:40])}, with a stress digit or without, sil, sp or spn"
            )
        spans.append((symbol, start, end))
    _write_utterance(folder, row["id"], audio, rate, spans)
    unknown_words = sum(phone["phoneme"] == "spn" for phone in phones)
    return row["id"], unknown_words, None


def _check_ids(rows, seen):
    """Yield the same rows. seen: a set of the ids so far, which grows.

    Raises a DataError if an id cannot be the name of a file, or is there twice.
    """
    for row in rows:
        if row["id"] is None or not re.fullmatch(r"[\w-]{1,100}", str(row["id"])):
            raise DataError(
                f"the id {row['id']!r} is no name of a file; expected one such as 103-1240-0000"
            )
        if row["id"] in seen:
            raise DataError(f"{row['id']}: this id is there twice; expected each once")
        seen.add(row["id"])
        yield row


def _convert_shard(rows, folders, done, seen):
    """Write the utterances of a shard, unless an earlier call has finished it.

    rows: an iterable of dicts. folders: of the partitions that get them in turn. done: the path of
    a file that says what became of them. seen: see `_check_ids`.
    Returns a list of what `_convert_row` has returned.
    """
    if not done.exists():
        jobs = zip(itertools.cycle(folders), _check_ids(rows, seen))
        records = list(map_in_threads(_convert_row, jobs))
        with atomic_write(done, 0) as temporary:
            temporary.write_text(json.dumps(records))
    return [tuple(record) for record in json.loads(done.read_text())]


def _conversion_error(name, error, partial):
    """The exception to raise if a source of this name could not be read or converted."""
    if Path(name).exists() and not isinstance(error, OSError):
        return DataError(
            f"{name}: unreadable parquet ({error!r:.300}); expected LibriSpeech alignments "
            "(id, audio, phonemes)"
        )
    there = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file()) / 1e6
    return RunError(
        f"{name}: {error!r:.300}. Check the connection and run again.{internet_hint()} In all, "
        f"LibriSpeech needs about 5,600 MB; {there:,.0f} MB are there, kept in {partial}."
    )


def make_librispeech_corpus(root, source=LIBRISPEECH, revision=None):
    """Make a corpus of real speech in the course's layout, from LibriSpeech and its phones' times.

    It is read as a stream: neither the audio nor the dataset is ever whole on the disk or in
    memory. If it is killed or cut off, the next call goes on with the shard it was in, and ends
    with the same bytes.
    root: its folder. ROOT/answers.csv (`id,label`) has the phonemes of the test frames,
    ROOT/left-out.txt the utterances without alignment or whose phones end half a second off.
    source: a dataset on the Hugging Face hub, a local .parquet file or a folder of them, with the
    columns `id`, `audio` {bytes, path} and `phonemes` [{phoneme, start, end}] (ARPAbet, seconds). A
    file named train_clean_100..., dev_clean... or test_clean... belongs to that partition; of
    another one, train gets three utterances in five.
    revision: a commit, tag or branch of the dataset on the hub. None: LIBRISPEECH_REVISION, or the
    newest one of other datasets.
    Raises FileExistsError if `root` exists, DataError for bad files or rows, RunError for the
    network or the disk.
    """
    import_torchaudio()
    from datasets import Audio, load_dataset

    sources = _sources(source, revision)
    # what was begun from other files, or another revision of them, is made from the start
    changed_at = [os.stat(name).st_mtime_ns if os.path.exists(name) else 0 for name, *_ in sources]
    made_from = ascii([(*each, time_ns) for each, time_ns in zip(sources, changed_at)])
    note = Path(f"{root}.partial", "made-from.txt")
    if note.parent.exists() and not (note.exists() and note.read_text() == made_from):
        shutil.rmtree(note.parent)

    records = []
    with _new_corpus(Path(root)) as partial:
        note.write_text(made_from)
        for number, (name, arguments, partitions) in enumerate(sources):
            folders = [partial / partition for partition in partitions]
            try:
                stream = load_dataset(**arguments, streaming=True)
                stream = stream.select_columns(["id", "audio", "phonemes"])
                stream = stream.cast_column("audio", Audio(decode=False))  # it needs torchcodec
                shards = stream.num_shards
                for i in range(shards):
                    done = partial / f"{number:03d}-{i:03d}.json"
                    seen = {record[0] for record in records}
                    records += _convert_shard(stream.shard(shards, i), folders, done, seen)
                    print(f"{name}: part {i + 1} of {shards}, {len(records):,} utterances so far")
            except DataError as error:
                raise DataError(f"{name}: {error}") from None
            except Exception as error:  # a dozen types, of four libraries
                raise _conversion_error(name, error, partial) from error
        left_out = [f"{name}: {why}\n" for name, _, why in sorted(records) if why]
        (partial / "left-out.txt").write_text("".join(left_out))
    unknown_words = sum(unknown for _, unknown, _ in records)
    print(
        f"{root}: {len(records) - len(left_out):,} utterances; {len(left_out):,} left out (their "
        f"ids are in left-out.txt); {unknown_words:,} unknown words (spn) count as silence"
    )


# ---- Where the data are --------------------------------------------------------------------------


def _subfolders(folder):
    """The folders in a folder that may hold a data folder, sorted; none if it cannot be listed."""
    try:
        with os.scandir(folder) as entries:
            folders = [Path(entry) for entry in entries if entry.is_dir()]
    except OSError:
        return []
    return sorted(
        folder
        for folder in folders
        if not is_clutter(folder.name)
        and folder.suffix != ".partial"  # a corpus that is being made
        and folder.name not in PARTITIONS + KINDS  # tens of thousands of files
    )


def _find_roots(places, levels=4):
    """The folders that hold train-clean-100/mfcc: these places, or so many levels below them.

    Folders of utterances and hidden ones are not looked into.
    """
    roots, seen, folders = [], set(), places
    for level in range(levels + 1):
        deeper = []
        for folder in folders:
            real = os.path.realpath(folder)
            if real in seen:  # by way of another link, or of one that leads back up
                continue
            seen.add(real)
            if os.path.isdir(folder / PARTITIONS[0] / KINDS[0]):
                roots.append(folder)
            elif level < levels:
                deeper += _subfolders(folder)
        folders = deeper
    return roots


def _only_root(roots, places):
    """The one folder that `_find_roots` has found in these places.

    Raises a DataError that says where it was looked for if there is none, or more than one.
    """
    if len(roots) == 1:
        return roots[0]
    looked = ", ".join(map(str, places))
    if roots:
        raise DataError(
            f"{', '.join(map(str, roots))}: each of them holds train-clean-100/mfcc; expected one "
            f"folder. Looked through: {looked}. Say which: by the environment variable HW1P2_DATA, "
            "with config['data'] = 'auto'."
        )
    missing = "" if any(map(os.path.isdir, places)) else "there is no such folder; "
    raise DataError(
        f"{looked}: {missing}expected a folder, there or up to four levels below, with "
        "{train-clean-100,dev-clean}/{mfcc,transcript}/*.npy and test-clean/mfcc/*.npy"
    )


def _folders_beside():
    """The folders beside the notebook that are named as the course's data are."""
    pattern = re.compile(r"hw-?1-?p-?2|11785|^archive$", re.IGNORECASE)
    return [folder for folder in _subfolders(".") if pattern.search(folder.name)]


def _attached_on_kaggle():
    """The folders of what is attached to a notebook on Kaggle."""
    groups = {"competitions": "*", "datasets": "*/*", "notebooks": "*/*"}  # the last two by owner
    attached = []
    for folder in sorted((KAGGLE / "input").glob("*")):
        if folder.name in groups:
            attached += sorted(folder.glob(groups[folder.name]))
        else:
            attached.append(folder)
    return attached


def _download(competition):
    """The data folder of a Kaggle competition, downloaded; what is there is not fetched again."""
    install("kagglehub")
    load_secrets("KAGGLE_API_TOKEN", "KAGGLE_USERNAME", "KAGGLE_KEY")
    from kagglehub import competition_download

    try:  # it resumes a broken download, compares the checksum, unpacks, and knows Colab's secrets
        folder = Path(competition_download(competition))
    except Exception as error:  # its own, of the network, of the archive, of the disk
        raise RunError(
            f"Kaggle's data could not be fetched ({type(error).__name__}: {str(error)[:300]}).\n"
            f"{kaggle_causes(competition)} Or the disk is full: 9 GB are needed. What is there is "
            "kept: run again."
        ) from error
    return _only_root(_find_roots([folder]), [folder])


def _make_once(root, make, *packages):
    """Call make(root), unless that folder is there, after installing the packages it needs."""
    if root.exists():
        return
    with one_process_at_a_time(root):  # of two notebooks that ask at once, the second one waits
        if not root.exists():
            install(*packages)
            print(f"{root} is not there yet: making it")
            make(root)


def get_data(choice, cache, competition):
    """The data folder, which holds `train-clean-100/mfcc`; fetched or made if need be.

    choice: config["data"].
        "auto": the folder below $HW1P2_DATA; else below the folders beside the notebook that are
        named as the course's data are, or below what is attached on Kaggle; else the practice
        corpus.
        "kaggle": those below the notebook's or Kaggle's folders, else downloaded with kagglehub.
        "practice", "librispeech": made here (see `make_practice_corpus` and so on).
    cache: where corpora are made.
    competition: the edition's name on Kaggle. The data of all editions are the same.
    Raises a DataError if no folder, or more than one, holds the data, and a RunError if they cannot
    be fetched or written; what is there already is kept for the next start.
    """
    chosen = path_from_environment("HW1P2_DATA") if choice == "auto" else None
    if chosen:
        return _only_root(_find_roots([chosen]), [chosen])
    if choice in ("auto", "kaggle"):
        beside, attached = _folders_beside(), _attached_on_kaggle()
        named = [folder for folder in attached if folder.name == competition]
        roots = _find_roots(beside + named)
        # without corpora that another copy of this project has made
        roots = [root for root in roots if not (root / "answers.csv").exists()]
        if not roots:
            roots = _find_roots(attached)
        if roots:
            root = _only_root(roots, beside + attached)
            if KAGGLE in root.parents and competition not in root.parts:
                print(f"{root}: these data are attached, and taken in place of {competition}")
            return root
        if choice == "kaggle":
            return _download(competition)
        if beside + attached:
            looked = ", ".join(map(str, beside + attached))
            line = f"no train-clean-100/mfcc in {looked}: taking the practice corpus"
            if attached:
                line += f". For the course's data, attach {competition} (Add Input)"
            print(line)
    if choice == "librispeech":
        root = Path(cache) / "librispeech"
        _make_once(root, make_librispeech_corpus, "datasets", "soundfile")
    else:
        root = Path(cache) / PRACTICE
        _make_once(root, make_practice_corpus, "espeakng-loader")
    return root
