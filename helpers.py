"""The module behind the notebook hw1p2_starter.ipynb: everything that is not the lesson itself.

It reads from top to bottom as the data flow. A folder of .npy files becomes one array, the array becomes windows, and
the windows become batches:

    data = AudioDataset(root, "train-clean-100", context=50)  # root: a folder in the course's layout
    maps = warp_maps(0.2, data)
    for frames, phonemes in make_loader(data, 2048, shuffle=True):  # float16 (2048, 101, 28) and int64 (2048,)
        mask_frames(warp_frames(frames, maps), "FreqMask")  # in place

Sections, and the functions to start with:

    Errors and files         DataError, RunError, atomic_write, one_process_at_a_time
    Config                   check_config
    Code                     code_of, code_differences
    Device and precision     pick_device, pick_precision
    Reading                  read_partition
    Windows and loaders      AudioDataset, make_loader
    Augmentation             mask_frames, warp_maps, warp_frames
    Network                  Dropout, scale_dropout, print_layers
    Loss and schedule        loss_weight, check_schedule
    Metrics                  confusion_matrix, boundary_distance, calibration
    Figures                  draw_frames, draw_phones
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

import numpy as np
import pandas as pd
import safetensors.torch
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

# ---- Constants ---------------------------------------------------------------------------------------------

PHONEMES = (
    "[SIL] AA AE AH AO AW AY B CH D DH EH ER EY F G HH IH IY JH K L M N NG OW OY P R S SH T TH UH UW V W Y "
    "Z ZH [SOS] [EOS]"
).split()
MANNERS = {  # manner of articulation: its phonemes, in the order of the confusion matrix's picture
    "silence": ["[SIL]"],
    "vowels": "IY IH EH AE AH ER UW UH AO AA OW EY AY OY AW".split(),
    "glides, liquids": "Y W R L".split(),
    "nasals": "M N NG".split(),
    "stops": "P B T D K G".split(),
    "affricates": "CH JH".split(),
    "fricatives": "F V TH DH S Z SH ZH HH".split(),
}
PARTITIONS = ("train-clean-100", "dev-clean", "test-clean")
KINDS = ("mfcc", "transcript")  # folders of a partition; test has the first one only
OLD_SPELLING = {"SIL": "[SIL]", "<sos>": "[SOS]", "<eos>": "[EOS]"}  # of the editions of 2022
LIFTER = 22  # HTK's default: coefficient i is multiplied by 1 + 11 sin(pi i / 22)
LIBRISPEECH = "gilkeyio/librispeech-alignments"  # on the Hugging Face hub: 33,861 utterances, 7 GB; 5.3 GB as MFCCs
LIBRISPEECH_REVISION = "0daa1eb43dda38ee6ce752e785555380e5628f5c"  # of 2023-11-22
PRACTICE = "practice-corpus"  # the name of its folder
EDITIONS = {  # Kaggle's names of the course's competitions, the default first: the folder of their data
    "11785-spring-25-hw-1-p-2": "11785-s25-hw1p2",
    "11785-hw1p2-f24": None,
    "11785-hw-1-p-2-fall-2025-main": "11785-f25-hw1p2",
    "hw-1-p-2-spring-2026-student-competition": "11785-spring-2026-hw1p2",
    "hw-1-p-2-fall-2026-student-competition": None,
    "hw-1-p-2-fall-2026-slack-competition": None,
}
KAGGLE = Path("/kaggle")  # on Kaggle's own notebooks: input/ is what was attached, working/ is kept


# ---- Errors and files --------------------------------------------------------------------------------------


class DataError(ValueError):
    """Bad input data. The message names the file, what is wrong with it, and what was expected."""


class RunError(RuntimeError):
    """A run that cannot go on. The message says what happened and what to do."""


def path_from_environment(name):
    """The path in an environment variable, ~ and $VARIABLES expanded; None where it is unset or empty."""
    value = os.environ.get(name, "").strip(" \t\r\n'\"")  # %env and .env files keep the quotes
    path = os.path.expanduser(os.path.expandvars(value))
    if path.startswith("~"):  # left as it is where there is no such user
        raise RunError(f"{name} is {value}: there is no home directory for {path.split(os.sep)[0]}")
    return Path(path) if value else None


def is_clutter(name):
    """Is this the name of a hidden file, a backup or an archive's extras, which systems and editors leave behind?"""
    return name.startswith((".", "~")) or name.endswith("~") or name == "__MACOSX"


def find_files(folder, *patterns):
    """The sorted paths below a folder that match one of these patterns of `Path.glob`, without clutter."""
    return sorted(
        path
        for pattern in patterns
        for path in Path(folder).glob(pattern)
        if not any(map(is_clutter, path.relative_to(folder).parts))
    )


def shorten(text, width=200):
    """A foreign text, such as an error's, on one line of at most `width` characters, cut between words."""
    return textwrap.shorten(str(text), width, placeholder=" ...")


def first_ten(lines, more="more"):
    """The first ten of these lines, and one that counts the others."""
    rest = len(lines) - 10
    return lines[:10] + ([f"... and {rest:,} {more}"] if rest > 0 else [])


def last_words(text, width=300):
    """The end of a foreign text, at most `width` characters, beginning with a word."""
    end = text[-width:]
    return end if len(text) <= width else re.sub(r"^\S+\s+", "", end)


def internet_hint():
    """A hint for messages about failed downloads: on Kaggle the Internet is a switch. Elsewhere it is empty."""
    return " On Kaggle, Settings > Internet must be on." if KAGGLE.is_dir() else ""


def _can_import(name):
    """Is there a module of this name? A mere folder of that name beside the notebook is none: it has no origin."""
    spec = importlib.util.find_spec(name)
    return spec is not None and spec.origin is not None


def install(*packages):
    """Install with pip what cannot be imported yet, such as "torchsummaryX==1.1.0"; a RunError where that fails."""
    if wanted := [
        each for each in packages if not _can_import(each.split("=")[0].replace("-", "_"))
    ]:
        print("installing", *wanted)
        command = [sys.executable, "-m", "pip", "install", "--quiet", *wanted]
        pip = subprocess.run(command, capture_output=True, text=True)
        if pip.returncode:
            raise RunError(
                f"pip could not install {' '.join(wanted)}: {last_words(pip.stderr)}\nIs there a connection?"
                + internet_hint()
            )
        importlib.invalidate_caches()
        for name in {each.split("=")[0].replace("-", "_") for each in wanted}:
            sys.modules.pop(name, None)  # a mere folder of that name, imported before


@contextlib.contextmanager
def atomic_write(path, size):
    """Give a temporary path beside `path`; flush it and move it into place only if the block succeeds.

    A reader sees the old file or the new one, never a part of it. If it cannot be written, a RunError says how many
    bytes are needed (`size`) and how many are free.
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
            f"{path} could not be written ({error}): {size / 1e6:.1f} MB are needed there, {free / 1e6:.1f} "
            "MB are free. What was there before is unchanged. Free some space and run again."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def check_writable(folder):
    """Return the folder, made if need be; a RunError where files cannot be written into it."""
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
    """A file that closes without a ResourceWarning when it is garbage-collected."""

    def __del__(self):
        self.close()


def take_lock(path, say=print):
    """Lock the file `path` for this process until the returned file is closed; None if another process holds the lock.

    The operating system releases the lock when the process ends, even if it is killed. On a file system without locks
    `say` gets a warning and the work goes on. Raises a RunError if the file cannot be created.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _LockFile(path, "a")
    except OSError as error:
        raise RunError(f"{path.parent} cannot be written to: {error}") from error
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.close()
        return None
    except OSError as error:
        say(
            f"{path} cannot be locked on this file system ({error}): going on without a lock. Do not start a second "
            "notebook that writes there at the same time."
        )
    return file


@contextlib.contextmanager
def one_process_at_a_time(path):
    """Let one process at a time into the block: a second notebook that makes the file or folder `path` waits."""
    for attempt in itertools.count():
        if lock := take_lock(path.with_name(f".{path.name}.lock")):
            break
        if attempt == 0:
            print(f"another notebook is making {path}: waiting for it")
        time.sleep(0.1)
    with lock:
        yield


def map_in_threads(function, jobs):
    """Yield function(job) for each job, in order. 16 threads work ahead, and end with the generator."""
    pool = ThreadPoolExecutor(16)
    try:
        futures = (pool.submit(function, job) for job in jobs)
        pending = deque(itertools.islice(futures, 64))
        while pending:
            yield pending.popleft().result()
            pending.extend(itertools.islice(futures, 1))
    finally:
        pool.shutdown(cancel_futures=True)


# ---- Config -------------------------------------------------------------------------------------------------


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
    """Is the value among the allowed ones, of the same type too? True is not 1."""
    return any(type(value) is type(option) and value == option for option in allowed)


def _spelled(value, allowed):
    """The one of the allowed values that this text stands for, in upper or lower case; other values as they are."""
    if not isinstance(value, str) or not isinstance(allowed, (list, tuple)):
        return value
    options = (
        allowed if isinstance(allowed, list) else allowed[3:]
    )  # behind (type, lowest, highest)
    alike = [option for option in options if str(option).casefold() == value.casefold()]
    return value if value in alike or not alike else alike[0]


def check_config(config, options, defaults=None):
    """A checked copy of a config; numpy's numbers and one-element tensors in it become Python's.

    options: what each key may be: a list of values, with str among them for the name of a run; (type, lowest, highest),
    with other values behind them; or str for the name of a folder. A text may have other capitals than the option:
    "GELU" becomes "gelu", "None" None.
    defaults: the values of keys that are missing; None: they are faults.
    Raises a ValueError that lists every unknown or missing key and every value that is not allowed.

    Example: check_config({"epochs": np.int64(3)}, {"epochs": (int, 1, 10)})  # {"epochs": 3}
    """
    config = {**(defaults or {}), **config}
    config = {
        key: value.item() if getattr(value, "ndim", None) == 0 else value
        for key, value in config.items()
    }
    config = {key: _spelled(value, options.get(key)) for key, value in config.items()}
    faults = [
        f"unknown key {key!r}; the keys are {', '.join(options)}"
        for key in config
        if key not in options
    ]
    faults += [f"the key {key!r} is missing" for key in options if key not in config]
    for key, allowed in options.items():
        value = config.get(key)
        if allowed is str:
            good = _is_name(value)
            hint = (
                '1 to 200 characters (bytes in UTF-8) that can name a folder: none of / \\ < > : " | ? * [ ], no '
                "dot or blank at the ends; and not 'cache'"
            )
        elif isinstance(allowed, list):
            named = (
                str in allowed and isinstance(value, str) and all(map(_is_name, value.split("/")))
            )
            good = named or _is_one_of(value, allowed)
            hint = ", ".join("the name of a run" if each is str else repr(each) for each in allowed)
        else:
            kind, low, high, *others = allowed
            number = isinstance(value, (int, kind)) and not isinstance(value, bool)
            good = low <= value <= high if number else _is_one_of(value, others)
            hint = f"{low} to {high} ({'a whole number' if kind is int else 'a number'})"
            hint = " or ".join([hint, *map(repr, others)])
        if key in config and not good:
            faults.append(f"{key!r} is {value!r}; allowed: {hint}")
    if faults:
        raise ValueError("config: " + "\n        ".join(faults))
    return config


def variant_name(changes):
    """The name of a variant by its changes to the config, a dict: short enough for a folder, the same each time."""
    text = ",".join(f"{key}={value}" for key, value in sorted(changes.items())) or "base"
    name = re.sub(r"[^\w.,=+-]", "_", text)
    return (
        name
        if _is_name(name)
        else f"{name[:40].strip('.')}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    )


# ---- Code: what a run was made by --------------------------------------------------------------------------

FOR_SPEED = (
    "fused",
    "foreach",
    "capturable",
)  # options of optimizers that do not change what they compute


def _is_ours(thing):
    """Is this function or class of the notebook, of this file or of another one of the user's, not of a library?"""
    if inspect.isclass(thing):
        module = sys.modules.get(thing.__module__)
        path = getattr(module, "__file__", None) or ""
        if module is not None and not path and module.__name__ != "__main__":
            return False  # built in
    else:
        path = thing.__code__.co_filename
    libraries = [
        sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")
    ]
    installed = {"site-packages", "dist-packages"} & set(Path(path).parts)
    return not installed and not path.startswith(tuple(libraries))


def _read_source():
    with contextlib.suppress(OSError):
        return Path(__file__).read_text("utf-8")


_SOURCE = _read_source() or ""  # of this file, as it was imported


def edited_hint():
    """A line for the user where this file was edited after its import; else ""."""
    if _read_source() in (_SOURCE, None):
        return ""
    return (
        "helpers.py was edited after it was imported: restart the kernel, or the edit has no effect"
    )


@functools.lru_cache(100)
def _sources_in(text):
    """The sources of all functions and lambdas in a text, by their first line and name.

    Of lambdas that begin in one line it is the source of all.
    """
    sources, lines = {}, text.splitlines(keepends=True)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            first = min(each.lineno for each in [node, *node.decorator_list])
            sources[first, node.name] = textwrap.dedent("".join(lines[first - 1 : node.end_lineno]))
        elif isinstance(node, ast.Lambda):
            others = sources.get((node.lineno, "<lambda>"), "")
            sources[node.lineno, "<lambda>"] = f"{others}({ast.get_source_segment(text, node)})\n"
    return sources


def _source(function):
    """The source of a function or a lambda; None where it cannot be had, as in a plain Python prompt."""
    code = function.__code__
    imported = code.co_filename == __file__  # the file may have been edited since
    text = (
        _SOURCE if imported else "".join(linecache.getlines(code.co_filename, function.__globals__))
    )
    try:
        return _sources_in(text).get((code.co_firstlineno, code.co_name))
    except SyntaxError:
        return None


def _is_simple(value):
    """Is it a number, a text, None, or a list or tuple of these?"""
    parts = value if isinstance(value, (tuple, list)) else [value]
    return all(isinstance(part, (bool, int, float, str, type(None))) for part in parts)


def _used_by(function, source):
    """{name: value} of the functions, classes and CONSTANTS outside a function that its source uses."""
    known = dict(function.__globals__)
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or ()):
        with contextlib.suppress(ValueError):  # not assigned yet
            known[name] = cell.cell_contents
    used = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name):
            name, value = node.id, known.get(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            name, owner = node.attr, known.get(node.value.id)
            value = getattr(owner, name, None) if inspect.ismodule(owner) else None
        else:
            continue
        value = inspect.unwrap(value) if callable(value) else value
        constant = _is_simple(value) and (name.isupper() or name in function.__code__.co_freevars)
        code = (inspect.isfunction(value) or inspect.isclass(value)) and _is_ours(value)
        if constant or code:
            used[name] = value
    return used


def _describe(name, value, texts, above=()):
    """Add to `texts` what a value is, under its name, and what makes it up, under names below that.

    above: the ids of the values that this one is a part of; one that is a part of itself ends there.
    """
    value = inspect.unwrap(value) if callable(value) else value
    value = value.__func__ if inspect.ismethod(value) else value
    if id(value) in above and not _is_simple(value):
        return
    above += (id(value),)
    if isinstance(value, functools.partial):
        _describe(name, value.func, texts, above)
        given = {**dict(enumerate(value.args)), **value.keywords}
        simple = {
            key: each for key, each in given.items() if key not in FOR_SPEED and _is_simple(each)
        }
        texts[f"{name}, given"] = (
            ", ".join(f"{key}={each!r}" for key, each in simple.items()) or "nothing"
        )
        for key in given.keys() - simple.keys() - {*FOR_SPEED}:
            _describe(f"{name}, {key}", given[key], texts, above)
    elif inspect.isfunction(value) and _is_ours(value):
        key = name if value.__name__ == "<lambda>" else value.__qualname__
        source = None if key in texts else _source(value)
        if key != name:
            texts.setdefault(name, key)
        if source is not None:
            texts[key] = source
            for used, each in _used_by(value, source).items():
                enclosed = used in value.__code__.co_freevars
                _describe(f"{key}, {used}" if enclosed else used, each, texts, above)
    elif inspect.isfunction(value) or inspect.isclass(value) or inspect.isbuiltin(value):
        texts.setdefault(name, f"{value.__module__}.{value.__qualname__}")
        members = (
            [each for parent in value.__mro__ if _is_ours(parent) for each in vars(parent).values()]
            if inspect.isclass(value)
            else []
        )
        for member in members:
            member = getattr(member, "__func__", None) or getattr(member, "fget", None) or member
            if inspect.isfunction(member):
                _describe(member.__qualname__, member, texts, above)
    elif isinstance(value, torch.Tensor):
        numbers = [f"{each:.4g}" for each in value.flatten()[:1000].tolist()]
        texts[name] = f"{value.dtype} {tuple(value.shape)}: {' '.join(numbers)}"
    elif _is_simple(value):
        texts[name] = repr(value)
    elif isinstance(value, (dict, list, tuple)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        texts[name] = type(value).__name__
        for key, each in items:
            _describe(f"{name}.{key}", each, texts, above)
    else:  # an object: its class, and what it holds
        _describe(name, type(value), texts, above)
        held = {
            key: each
            for key, each in getattr(value, "__dict__", {}).items()
            if not key.startswith("_")
        }
        if isinstance(value, torch.nn.Module):
            held.pop("training")
            held |= {**dict(value.named_parameters()), **dict(value.named_buffers())}
        for key, each in held.items():
            if _is_simple(each) or isinstance(each, torch.Tensor) or inspect.isfunction(each):
                _describe(f"{name}.{key}", each, texts, above)


def code_of(parts):
    """What these parts do, as text by name: to be kept with a run, and compared by `code_differences`.

    Of functions and classes of the notebook and of this file it is the source, with that of all functions, classes and
    CONSTANTS that they use; of other things what they are and what they hold. Where there is no source, there is no
    text. parts: {name: a function, a class, an object or a container of such}.
    """
    texts = {}
    for name, part in parts.items():
        _describe(name, part, texts)
    return texts


def code_of_network(model):
    """The same for a network: its layers, and the source of those classes that are the user's."""
    texts = {}
    for name, layer in model.named_modules():
        if name.split(".")[-1] != "_orig_mod":  # the inside of a compiled one
            layer = getattr(layer, "_orig_mod", layer)
            name = f"layer {name.replace('_orig_mod.', '')}" if name else "network"
            # each setting by itself: other versions of torch print more or fewer of them
            settings = re.split(r", (?=\w+=)", layer.extra_repr())
            named = [setting.split("=", 1) for setting in settings if re.match(r"\w+=", setting)]
            texts[name] = (
                f"{type(layer).__name__}({'' if named and len(named) == len(settings) else settings[0]})"
            )
            texts |= {f"{name}, {key}": value for key, value in named}
            if _is_ours(type(layer)):
                _describe(type(layer).__qualname__, type(layer), texts)
    return texts


class _Bare(ast.NodeTransformer):
    """Take docstrings and `torch.compile` out of a syntax tree."""

    def generic_visit(self, node):
        super().generic_visit(node)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            if ast.get_docstring(node, clean=False) is not None:
                node.body = node.body[1:] or [ast.Pass()]
            node.decorator_list = [
                each for each in node.decorator_list if "torch.compile" not in ast.unparse(each)
            ]
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.compile" and node.args:
            return node.args[0]
        return node


def _is_same_code(one, other):
    """Do two sources differ in nothing but comments, layout, docstrings and `torch.compile`?"""
    try:  # both by the Python that runs now: its syntax trees differ from version to version
        return (
            one == other
            or len({ast.dump(_Bare().visit(ast.parse(each))) for each in (one, other)}) == 1
        )
    except SyntaxError:
        return False


def code_differences(saved, now):
    """Lines that say what differs between two results of `code_of`; what only one of them has is no difference."""
    lines = []
    for name in saved:
        if name in now and not _is_same_code(saved[name], now[name]):
            if "\n" in saved[name].strip() + now[name].strip():
                changes = difflib.unified_diff(
                    saved[name].splitlines(), now[name].splitlines(), n=0, lineterm=""
                )
                changes = [
                    line for line in [*changes][2:] if not line.startswith("@@")
                ]  # two lines of a header
                lines.append(f"`{name}` has changed; - there, + now:")
                lines += [f"  {line}" for line in first_ten(changes, "more lines")]
            else:
                lines.append(f"{name}: {saved[name]} there, {now[name]} now")
    return lines


# ---- Device and precision ----------------------------------------------------------------------------------


def pick_device():
    """(device, its name): "cuda", "mps" or "cpu"; a RunError where there is a GPU that this torch cannot use."""
    if not torch.cuda.is_available():
        if torch.backends.mps.is_available():
            return "mps", f"{platform.machine()} Apple GPU"
        return "cpu", f"{platform.machine()} CPU, {os.cpu_count()} cores"
    name = torch.cuda.get_device_name()
    try:
        torch.ones(
            8, device="cuda"
        ).sum().item()  # an old GPU is "available" and fails at its first operation
    except RuntimeError as error:
        raise RunError(
            f"torch {torch.__version__} cannot use this GPU, {name} ({str(error).splitlines()[0]}). Choose "
            "another one: on Kaggle Settings > Accelerator > GPU T4 x2, on Colab Runtime > Change runtime "
            "type > T4."
        ) from None
    others = torch.cuda.device_count() - 1
    return "cuda", name + (f" (the first of {others + 1}: a run uses one)" if others else "")


def pick_precision(device, saved=None):
    """The dtype of the matrix products: the fastest on this device; a resumed run keeps its own if it can.

    float16 needs a gradient scaler; bfloat16 has the range of float32 and needs none. On a CPU it is bfloat16 where the
    processor has instructions for its products (AVX-512 BF16 or AMX): elsewhere both are emulated, and slow.
    saved: "float32", "bfloat16" or "float16", from a checkpoint of the run.
    """
    if device == "mps":
        return torch.float32
    if device == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        supported = [torch.bfloat16, torch.float16] if native else [torch.float16]
    else:
        has = getattr(torch.cpu, "get_capabilities", dict)()
        native = has.get("avx512_bf16") or has.get("amx_bf16")
        supported = [torch.bfloat16, torch.float32] if native else [torch.float32]
    return next((dtype for dtype in supported if str(dtype) == f"torch.{saved}"), supported[0])


# ---- Reading: a folder of .npy files -> one packed array ---------------------------------------------------

GAP = 50  # zero rows between utterances, at least; contexts up to this share one cache file
_INDEX = {phoneme: i for i, phoneme in enumerate(PHONEMES[:40])}
MOST_COEFFICIENTS = 100  # more columns are no MFCCs, perhaps frames: a transposed array


def _mfccs(array, coefficients):
    """Check one utterance's MFCCs (T, k) and normalise them over time: (x - mean) / (std + 1e-8).

    Returns them, float64 (T, k), and the mean (k,) and std (k,) that they had.
    """
    if array.dtype.kind != "f" or array.dtype.itemsize > 8:
        raise ValueError(f"dtype {array.dtype}; expected float32")
    if array.ndim != 2 or len(array) < 1 or array.shape[1] != coefficients:
        raise ValueError(
            f"shape {array.shape}; expected (frames, {coefficients}) with at least one frame"
        )
    with np.errstate(all="ignore"):
        # less the first row, a constant coefficient is exactly zero;
        # a rounding error over 1e-8 would be anything
        first = array[0].astype(np.float64)
        array = np.subtract(array, first, dtype=np.float64)
        mean = array.mean(axis=0)
        array -= mean
        std = np.sqrt(np.square(array).mean(axis=0))
        array /= std + 1e-8
    if not np.isfinite(
        std
    ).all():  # infinite too where the values are so large that their squares overflow
        raise ValueError("NaN, infinite or absurdly large values; expected finite MFCCs")
    return array, first + mean, std


def _labels(array):
    """Check one utterance's transcript, text (T+2,), and turn it into indexes into PHONEMES, uint8 (T,)."""
    if array.dtype.kind != "U":
        raise ValueError(f"dtype {array.dtype}; expected text, <U5")
    if array.ndim != 1 or len(array) < 3:
        raise ValueError(
            f"shape {array.shape}; expected (frames + 2,) for [SOS], one phoneme per frame, [EOS]"
        )
    ends = [OLD_SPELLING.get(str(end), str(end)) for end in (array[0], array[-1])]
    if ends != ["[SOS]", "[EOS]"]:
        raise ValueError(
            f"it starts with {str(array[0])!r} and ends with {str(array[-1])!r}; expected [SOS] and [EOS]"
        )
    array = array[1:-1]
    offsets = np.flatnonzero(
        np.append(True, array[1:] != array[:-1])
    )  # a phoneme lasts: one lookup for all its frames
    phonemes = array[offsets].tolist()
    phonemes = [OLD_SPELLING.get(phoneme, phoneme) for phoneme in phonemes]
    for t, phoneme in zip(offsets, phonemes):
        if phoneme not in _INDEX:
            raise ValueError(
                f"{phoneme!r} at frame {t} is not a phoneme; expected one of {' '.join(_INDEX)}"
            )
    return np.repeat(
        np.array([_INDEX[phoneme] for phoneme in phonemes], np.uint8),
        np.diff(offsets, append=len(array)),
    )


def _read(path):
    """The bytes of a file, or the error that it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        return error


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
    except (
        Exception
    ) as error:  # numpy's parser, Python's, and Python's tokenizer have a dozen kinds
        raise ValueError(f"{error}; expected one whole array in an .npy file") from None


def _count_coefficients(paths):
    """How many MFCCs a frame has: the columns of the first file, or of most of the first five if they differ."""
    found = []
    for path in paths[:5]:
        with contextlib.suppress(
            Exception
        ):  # whatever is wrong with it is reported when its turn comes
            frames, coefficients = _load_npy(_read(path)).shape
            if 1 <= coefficients <= MOST_COEFFICIENTS:
                found.append(coefficients)
    return statistics.mode(found) if found else 28  # as in most editions


def _convert(contents, paths, coefficients):
    """((MFCCs, means, stds), labels or None) of an utterance, and a list of what is wrong with its files."""
    arrays, faults = [None, None], []
    converters = functools.partial(_mfccs, coefficients=coefficients), _labels
    for i, (path, content, convert) in enumerate(zip(paths, contents, converters)):
        try:
            arrays[i] = convert(_load_npy(content))
        except Exception as error:  # whatever a damaged file provokes, it is that file's fault
            faults.append(f"{path}: {error}")
    if not faults and arrays[1] is not None and len(arrays[1]) != len(arrays[0][0]):
        faults.append(
            f"{paths[1]}: {len(arrays[1])} phonemes; expected {len(arrays[0][0])}, one per frame"
        )
    return *arrays, faults


def _raise_faults(folder, faults):
    if faults:
        lines = [f"{folder}: {len(faults):,} fault(s) in the data", *first_ten(faults)]
        raise DataError(_printable("\n".join(lines)))


def _printable(text):
    """Text with file names as it can be printed: their bytes that are no text are escaped."""
    return text.encode(errors="backslashreplace").decode()


def _pack(folder, names, kinds, gap):
    """Read, check, normalise and pack the utterances of these names: what `read_partition` returns."""
    paths = [[folder / kind / name for kind in kinds] for name in names]
    print(f"reading {len(names):,} utterances of {folder.name}")
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # numpy's and Python's, about what stands in a damaged header
        coefficients = _count_coefficients([mfcc for mfcc, *_ in paths])
        # room for as many frames as the files can hold; what is not written to takes no memory
        rows = sum(path.stat().st_size for path, *_ in paths if path.exists()) // (2 * coefficients)
        frames = torch.from_numpy(
            np.zeros((rows + gap * (len(names) + 1), coefficients), np.float16)
        )
        labels, lengths, means, stds, faults, row = [np.zeros(0, np.uint8)], [], [], [], [], gap
        # reading small files is mostly waiting: threads do it;
        # Python 3.11's parser of their headers is not thread-safe
        contents = map_in_threads(lambda files: [_read(path) for path in files], paths)
        for content, files in zip(contents, paths):
            mfccs, phonemes, wrong = _convert(content, files, coefficients)
            faults += wrong
            if not faults:
                mfcc, mean, std = mfccs
                frames[row : row + len(mfcc)] = torch.from_numpy(mfcc)
                row += len(mfcc) + gap
                lengths.append(len(mfcc))
                means.append(mean)
                stds.append(std)
                labels += [] if phonemes is None else [phonemes]
    _raise_faults(folder, faults)
    return {
        "frames": frames[:row],
        "offsets": torch.tensor([0, *itertools.accumulate(lengths)]),
        "labels": torch.from_numpy(np.concatenate(labels)),
        "means": torch.tensor(np.mean(means, axis=0), dtype=torch.float32),
        "stds": torch.tensor(np.mean(stds, axis=0), dtype=torch.float32),
    }


READING_CODE = {"_pack": _pack}  # what makes the numbers in the cache, with all that it uses


def _npy_files(folder):
    """Sorted names of the utterances' files in a folder, and of all else, which is not data.

    That is clutter, what has no .npy at the end, and copies beside their original: "x (1).npy", "x copy.npy",
    "x - Copy.npy", "x-Copy1.npy".
    """
    found = {*os.listdir(folder)}
    copies = {
        name
        for name in found
        if (match := re.match("(.+?)( |-Copy)", name)) and f"{match[1]}.npy" in found
    }
    names = {name for name in found - copies if name.endswith(".npy") and not is_clutter(name)}
    return sorted(names), sorted(found - names)


def _list_utterances(folder, kinds, subset):
    """Sorted names of a partition's first utterances; a DataError where one has no counterpart or none is left."""
    names = {}
    for kind in kinds:
        if not (folder / kind).is_dir():
            raise DataError(
                f"{folder / kind}: there is no such folder; expected ROOT/{{train-clean-100,dev-clean}}/"
                "{mfcc,transcript}/*.npy and ROOT/test-clean/mfcc/*.npy"
            )
        names[kind], ignored = _npy_files(folder / kind)
        if ignored:
            print(
                f"{folder.name}: ignored {len(ignored)} file(s) in {kind} that are not utterances: "
                + ", ".join(map(_printable, ignored[:5]))
            )
    if not names["mfcc"]:
        raise DataError(
            f"{folder / 'mfcc'}: there are no .npy files in it; expected one for each utterance"
        )
    _raise_faults(
        folder,
        [
            f"{folder / kind / name}: no {'transcript' if kind == 'mfcc' else 'MFCC file'} of the same "
            f"name in {folder / other}"
            for kind, other in itertools.permutations(kinds, 2)
            for name in sorted({*names[kind]} - {*names[other]})
        ],
    )
    mfccs = names["mfcc"]
    if int(subset * len(mfccs)) < 1:
        raise DataError(
            f"{folder}: subset {subset} of its {len(mfccs)} utterances is none; expected at least one"
        )
    return mfccs[: int(subset * len(mfccs))]


def _cache_key(folder, names, kinds, gap):
    """A digest of all that changes what the cache holds: format, gap, and each file's name, size and time."""

    def stamp(name):
        with contextlib.suppress(OSError):  # a link to nowhere: reported when it is read
            stats = [os.stat(os.path.join(folder, kind, name)) for kind in kinds]
            return name, *((stat.st_size, stat.st_mtime_ns) for stat in stats)

    return hashlib.sha256(
        repr(("packed 5", folder.name, gap, [*map_in_threads(stamp, names)])).encode()
    ).hexdigest()


def _as_tensor(text):
    return torch.tensor([*text.encode()], dtype=torch.uint8)


def _as_text(tensor):
    return tensor.numpy().tobytes().decode()


def _open_cache(path, key):
    """The packed tensors of a cache file, mapped into memory; None where it is missing, partial or not ours.

    Not ours is also what other code has made, before an edit of the functions of this section.
    """
    # the second way is for file systems that cannot map (some network disks): it reads the whole file
    for load in (
        safetensors.torch.load_file,
        lambda path: safetensors.torch.load(path.read_bytes()),
    ):
        with contextlib.suppress(Exception):  # whatever is wrong with it, it is rebuilt
            packed = load(path)
            code = json.loads(_as_text(packed.pop("code")))
            if _as_text(packed.pop("key")) == key and not code_differences(
                code, code_of(READING_CODE)
            ):
                return packed


def read_partition(root, partition, subset=1, gap=GAP, cache=None):
    """Read, check, normalise and pack one partition.

    root: data folder in the course's layout.
    partition: "train-clean-100", "dev-clean", or "test-clean" (which has no transcripts and is always whole).
    subset: the first int(subset * n) utterances of the n, in sorted order.
    gap: rows of zeros before, between and after the utterances.
    cache: folder for a packed copy (safetensors), written once and then mapped; it is made anew where a file has
    changed, or the code of this section.

    Returns a dict of CPU tensors: "frames" float16 (rows, k), normalised per utterance, in zero rows of `gap`;
    "labels" uint8 (n frames,), empty for test; "offsets" int64 (utterances + 1,), the first frame of each utterance
    and the number of all, counted without the gaps; "means" and "stds" float32 (k,), of each coefficient
    before normalisation: the mean over the utterances of its mean and of its standard deviation.
    k is the number of MFCCs in a frame, the same in all files.
    Raises a DataError that counts all faulty files and names the first ten.
    """
    folder = Path(root) / partition
    kinds, subset = (KINDS[:1], 1) if partition == "test-clean" else (KINDS, subset)
    names = _list_utterances(folder, kinds, subset)
    if cache is None:
        return _pack(folder, names, kinds, gap)
    key = _cache_key(folder, names, kinds, gap)
    path = Path(cache) / f"{partition}-{key[:16]}.safetensors"
    packed = _open_cache(path, key)
    if not packed:
        try:
            with one_process_at_a_time(path):
                packed = _open_cache(path, key)  # another one may have made it meanwhile
                if not packed:
                    packed = _pack(folder, names, kinds, gap)
                    code = json.dumps(code_of(READING_CODE))
                    stamped = {**packed, "key": _as_tensor(key), "code": _as_tensor(code)}
                    with atomic_write(path, packed["frames"].nbytes) as temporary:
                        safetensors.torch.save_file(stamped, temporary)
        except RunError as error:  # the cache is a convenience
            print(f"going on without a cache: {error}")
    return packed or _pack(folder, names, kinds, gap)


# The two conventions of MFCCs that we know; the natural order is c0, c1, ..., each with the factor 1.
CONVENTIONS = ("HTK", "torchaudio")


def columns_of(convention, coefficients):
    """Which coefficient each of the columns is, int64 (k,), and its factor, float32 (k,).

    "HTK": c1, c2, ..., c0; c0 times sqrt 2, c_i times the lifter 1 + 11 sin(pi i / 22), which is
    negative from c23 on (The HTK Book, sections 5.4 and 5.6). So are the course's features.
    "torchaudio": c0, c1, c2, ... as the cosine transform gives them (torchaudio.transforms.MFCC).
    """
    order = torch.arange(coefficients)
    if convention == "torchaudio":
        return order, torch.ones(coefficients)
    lifter = 1 + LIFTER / 2 * torch.sin(torch.pi * order / LIFTER)
    lifter[0] = 2**0.5
    return order.roll(-1), lifter.roll(-1)


def find_convention(means, stds):
    """Whose columns are these? "HTK", "torchaudio", or None where it is neither.

    means, stds: float32 (k,), of the coefficients before normalisation, over a training set.
    c0, the loudness, has by far the largest mean; it is HTK's last column and torchaudio's first.
    And c1 varies four times as much as c11 and more, but about as much where there is a lifter.
    """
    if len(means) < 13:
        return None
    second, first = means.abs().sort().values[-2:]
    if first < 1.25 * second or first < 1e-3:  # features that were normalised before have no means
        return None
    for convention in CONVENTIONS:
        order, _ = columns_of(convention, len(means))
        place = order.tolist().index
        liftered = stds[place(1)] < 2.4 * stds[place(11)]
        if means.abs().argmax() == place(0) and liftered == (convention == "HTK"):
            return convention
    return None


def describe_columns(data):
    """A line for the user: whose columns an `AudioDataset` has, and where c0 is."""
    if data.convention is None:
        return (
            "WARNING: these columns are neither HTK's nor torchaudio's MFCCs, so nobody knows how to stretch their "
            "frequencies: config['warp'] and config['test_warps'] are not used"
        )
    place = {"HTK": "the last one", "torchaudio": "the first one"}[data.convention]
    return f"{data.coefficients} MFCCs per frame in {data.convention}'s order: c0, the loudness, is {place}"


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
        root, partition, subset, cache: see `read_partition`, also for the errors.
        context: frames on either side, c.
        device: where the array lies and the batches are made.
        like: the training set, for the other partitions: its `convention` is theirs, and a DataError says
            where they have another number of coefficients.

    Attributes, beside the arguments: `coefficients`, the MFCCs per frame; `convention`, whose columns they are
    (see `find_convention`); `stds`, by which they were divided, float32 (k,); `utterances`, their number.

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
        self.partition, self.context, self.gap = partition, context, max(GAP, context)
        packed = read_partition(root, partition, subset, self.gap, cache)
        self.coefficients = packed["frames"].shape[1]
        if like is None:
            self.convention = find_convention(packed["means"], packed["stds"])
        else:
            self.convention = like.convention
            if like.coefficients != self.coefficients:
                raise DataError(
                    f"{Path(root) / partition / 'mfcc'}: {self.coefficients} MFCCs per frame; expected "
                    f"{like.coefficients}, as in {like.partition}"
                )
        self.frames, self.offsets, self.stds = (
            packed[name].to(device) for name in ("frames", "offsets", "stds")
        )
        self.labels = packed["labels"].to(device) if len(packed["labels"]) else None
        self.length, self.utterances = int(packed["offsets"][-1]), len(packed["offsets"]) - 1
        width, k = 2 * context + 1, self.coefficients
        self.windows = self.frames.as_strided((len(self.frames) - width + 1, width * k), (k, 1))

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        if isinstance(index, torch.Tensor) and index.dim() == 1:
            return self._batch(index)
        index = range(self.length)[
            int(index)
        ]  # an IndexError where it is out of range; negative ones from the end
        batch = self._batch(torch.tensor([index], device=self.frames.device))
        return batch[0] if self.labels is None else (batch[0][0], batch[1][0])

    def _batch(self, index):
        gaps = torch.searchsorted(
            self.offsets, index, right=True
        )  # that lie before the frame: one per utterance
        frames = torch.index_select(self.windows, 0, index + self.gap * gaps - self.context)
        frames = frames.view(len(index), -1, self.coefficients)
        return frames if self.labels is None else (frames, self.labels[index].long())

    def utterance(self, i):
        """(MFCCs float16 (T, k), phoneme indexes uint8 (T,) or None for test) of the i-th utterance."""
        first, last = self.offsets[i].item(), self.offsets[i + 1].item()
        shift = self.gap * (i + 1)
        return self.frames[
            first + shift : last + shift
        ], None if self.labels is None else self.labels[first:last]


class Batches(Sampler):
    """Batches of frame indexes: int64 tensors on the device, shuffled by `seed` and the epoch, or in order.

    The seed is 0 or more. torch's RandomSampler makes a Python list of all indexes, a gigabyte for 36 million frames.
    """

    def __init__(self, length, batch_size, shuffle=False, seed=23, device="cpu"):
        self.length, self.batch_size, self.shuffle, self.seed, self.device = (
            length,
            batch_size,
            shuffle,
            seed,
            device,
        )
        self.epoch = 0

    def set_epoch(self, epoch):
        """As in torch's DistributedSampler: the order depends on the epoch alone, so a resumed run repeats it."""
        self.epoch = epoch

    def __iter__(self):
        if self.shuffle:
            # mixed, so that the second epoch of a seed is not the first one of the next seed
            [seed] = np.random.SeedSequence([self.seed, self.epoch]).generate_state(1).tolist()
            generator = torch.Generator(self.device).manual_seed(seed)
            order = torch.randperm(self.length, generator=generator, device=self.device)
        else:
            order = torch.arange(self.length, device=self.device)
        return iter(order.split(self.batch_size)[: len(self)])

    def __len__(self):
        # BatchNorm cannot train on a single frame: where shuffling leaves one over, it waits for the next epoch
        one_over = self.shuffle and self.length % self.batch_size == 1
        return -(-self.length // self.batch_size) - one_over


def make_loader(dataset, batch_size, shuffle=False, seed=23):
    """A DataLoader of whole batches: float16 (B, 2c+1, k) and int64 (B,), or the frames alone for test, on the device.

    No workers: a batch is one gather, which is quicker than passing it between processes.
    dataset: an AudioDataset; a DataError for others, such as torch's Subset.
    """
    if not isinstance(dataset, AudioDataset):
        raise DataError(
            f"make_loader has got a {type(dataset).__name__}; expected an AudioDataset. A part of the "
            "utterances, or several partitions as one, is a folder of links to their files: see section "
            "12 of the notebook"
        )
    return DataLoader(
        dataset,
        sampler=Batches(len(dataset), batch_size, shuffle, seed, dataset.frames.device),
        batch_size=None,
    )


# ---- Augmentation ------------------------------------------------------------------------------------------


def _keep_mask(windows, size, param, device):
    """Bool (windows, size): False in a stretch of 0 ... param places, its width and its start uniform."""
    width, start = torch.rand(2, windows, 1, device=device)
    width = (width * (min(param, size) + 1)).long()
    start = (start * (size - width + 1)).long()
    place = torch.arange(size, device=device)
    return (place < start) | (place >= start + width)


def mask_frames(frames, augmentations="Both", freq_mask_param=4, time_mask_param=8):
    """SpecAugment's masks: a stretch of coefficients and/or of frames set to zero, drawn anew for every window.

    The width is uniform over 0 ... param and the position over all that fit (Park et al., "SpecAugment", 2019).
    Zero is the mean after normalisation.

    frames: float16 or float32 (B, 2c+1, k); changed in place, and returned.
    augmentations: "FreqMask", "TimeMask", "Both" or None; a ValueError for others.
    """
    if augmentations not in ("FreqMask", "TimeMask", "Both", None):
        raise ValueError(
            f"there is no mask {augmentations!r}; expected 'FreqMask', 'TimeMask', 'Both' or None"
        )
    bits = frames.view(torch.int16 if frames.dtype == torch.float16 else torch.int32)
    for name, axis, param in (("FreqMask", 2, freq_mask_param), ("TimeMask", 1, time_mask_param)):
        if augmentations in (name, "Both"):
            kept = _keep_mask(len(frames), frames.shape[axis], param, frames.device)
            bits.mul_(
                kept.unsqueeze(3 - axis)
            )  # by 1 or 0: as integers, a CPU does it five times as fast
    return frames


def _natural_maps(factors, coefficients, bands):
    """Maps of MFCCs in their natural order that read the mel bands at each of the factors times their frequencies.

    The way goes back to the log energies of the bands, on HTK's mel scale from 0 to 8 kHz, and returns by
    the cosine transform. Returns float32 (factors, k, k): cepstra (..., k) @ map are the warped ones.
    """

    def mel(hertz):
        return 2595 * torch.log10(1 + hertz / 700)

    step = mel(torch.tensor(8000.0)) / (bands + 1)
    centres = 700 * (10 ** (torch.arange(1, bands + 1) * step / 2595) - 1)  # of the bands, in Hz
    position = (mel(factors[:, None] * centres) / step - 1).clamp(
        0, bands - 1
    )  # (factors, bands), in bands
    read = (1 - (position[:, None] - torch.arange(bands)[:, None]).abs()).clamp(
        min=0
    )  # (factors, from, to)
    # the orthonormal one, (bands, k); torchaudio's `create_dct` gives the same, but training does not need torchaudio
    dct = torch.cos(
        math.pi / bands * (torch.arange(bands) + 0.5)[:, None] * torch.arange(coefficients)
    )
    dct[:, 0] *= 0.5**0.5
    dct *= (2 / bands) ** 0.5
    return dct.T @ read @ dct


def warp_maps(strength, data, count=41, dtype=torch.float32):
    """Maps that stretch or squeeze the frequencies by factors from 1 - strength to 1 + strength, evenly spaced.

    The idea: Jaitly and Hinton, "Vocal Tract Length Perturbation", 2013.
    data: an `AudioDataset`, whose convention says what its columns are (see `columns_of`).
    Returns `dtype` (count, k, k), on the device of the data: normalised frames @ map are the warped ones; None where
    the strength is 0 or the convention is not known: then there are no warps. Reading between the bands shrinks the
    high coefficients, so each is scaled to have the standard deviation 1 again, for coefficients that do not correlate.
    """
    if strength == 0 or data.convention is None:
        return None
    bands = max(
        28 if data.convention == "HTK" else 40, data.coefficients
    )  # as many as their usual makers take
    maps = _natural_maps(
        torch.linspace(1 - strength, 1 + strength, count), data.coefficients, bands
    )
    # a column of the data is a natural coefficient times `scale`: in its order, with its factor, over its std
    order, factors = columns_of(data.convention, data.coefficients)
    maps = maps[:, order][:, :, order].to(data.stds.device)
    stds = data.stds.clamp(min=data.stds.max() / 1000)  # a constant coefficient has none
    scale = factors.to(stds.device) / stds
    maps = maps / scale[:, None] * scale
    return (maps / maps.norm(dim=1, keepdim=True)).to(dtype)


def warp_frames(frames, maps):
    """Send each window of frames (B, 2c+1, k) through one of the maps (n, k, k), drawn at random; in place."""
    which = torch.randint(len(maps), (len(frames),), device=frames.device)
    return frames.copy_(frames.to(maps.dtype) @ maps[which])


# ---- Network -----------------------------------------------------------------------------------------------


class Dropout(torch.nn.Dropout):
    """torch's draws a random number for each unit; on a CPU, here four share one (p in steps of 1/65536).

    The rate p may change during the training (see `scale_dropout`), compiled or not.
    """

    @property
    def p(self):
        return self._p

    @p.setter
    def p(self, p):
        self._p = p
        if "rate_now" in self._buffers:
            self.rate_now.fill_(p)
        else:  # torch.compile takes numbers for constants, but no tensors
            self.register_buffer("rate_now", torch.tensor(float(p)), persistent=False)

    def forward(self, x):
        if not self.training:
            return x
        if torch.compiler.is_compiling():
            keep = torch.rand(x.shape, device=x.device) >= self.rate_now
            return x * keep.to(x.dtype) / (1 - self.rate_now).to(x.dtype)
        if x.device.type != "cpu":
            return super().forward(x)
        bits = (
            torch.empty(-(-x.numel() // 4), dtype=torch.int64)
            .random_(-(2**63), None)
            .view(torch.int16)
        )
        keep = bits[: x.numel()].view_as(x) >= round(self.p * 2**16) - 2**15
        return x * keep.to(x.dtype).mul_(1 / (1 - self.p))


DROPOUTS = (
    torch.nn.Dropout,
    torch.nn.Dropout1d,
    torch.nn.Dropout2d,
    torch.nn.Dropout3d,
    torch.nn.AlphaDropout,
    torch.nn.FeatureAlphaDropout,
)


def hidden_layers(model):
    """The Linear layers of a model in the order of their definition, without the output layer, of 42 units."""
    layers = [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear)]
    return [layer for layer in layers if layer.out_features != len(PHONEMES)]


def scale_dropout(model, config, train_frames, epoch):
    """Set the rates p of all dropout layers for this epoch, a factor times those that they were made with.

    It is config["dropout_scale"]; or "auto": with r training frames per parameter and x = (1.8 / r)^0.6 it goes
    over config["epochs"] in equal steps from the smaller one of x and 1 / x to x, within 0.1 ... 2. The course's data
    and network have r = 1.8, so x = 1. Of this factor a layer of n < 1600 units gets n / 1600: in a sum over its units,
    dropout p is noise in proportion to p / ((1 - p) n). tests/benchmarks/accuracy.md has the measurements behind it.

    n is that of the `hidden_layers` before it in the order of their definition; without one, it gets the factor whole.
    `functional.dropout` is no layer, and is not scaled. Returns the factor. The rate that a layer was made with is kept
    as its `rate`.
    """
    auto = config["dropout_scale"] == "auto"
    scale, share = config["dropout_scale"], 1  # share: of the scale, for the layer's width
    if auto:
        x = (1.8 * sum(map(torch.numel, model.parameters())) / train_frames) ** 0.6
        first, last = (min(max(factor, 0.1), 2) for factor in (min(x, 1 / x), x))
        scale = first + (last - first) * (epoch - 1) / max(config["epochs"] - 1, 1)
    hidden = {id(layer) for layer in hidden_layers(model)}
    for layer in model.modules():
        if auto and id(layer) in hidden:
            share = min(layer.out_features / 1600, 1)  # of the dropout behind it
        elif isinstance(layer, DROPOUTS):
            layer.rate = getattr(layer, "rate", layer.p)
            layer.p = min(scale * share * layer.rate, 0.99)
    return scale


def print_layers(model, frames):
    """Print torchsummaryX's table of a model's layers for these frames; without torchsummaryX, the model itself."""
    try:
        install("torchsummaryX==1.1.0")
        from torchsummaryX import summary

        summary(model, frames)
    except Exception as error:  # it cannot be installed, or does not know what to make of a module
        print(f"no table of the layers ({error!r:.200}):\n{model}")


# ---- Loss and schedule --------------------------------------------------------------------------------------


def loss_weight(criterion, phonemes):
    """How much the mean loss of a batch weighs in the mean of an epoch; phonemes: int64 (B,).

    That is the number of frames; or, where torch's cross entropy has weights of the classes or ignores one, the sum of
    the frames' weights, by which it divides. So the loss of a data set does not depend on the size of its batches.
    Other losses, and functions, are taken for means over the frames.
    """
    divides = torch.nn.CrossEntropyLoss.forward, torch.nn.NLLLoss.forward
    if getattr(type(criterion), "forward", None) not in divides:
        return len(phonemes)
    if criterion.weight is None and criterion.ignore_index < 0:
        return len(phonemes)
    weights = 1.0 if criterion.weight is None else criterion.weight[phonemes]
    return (weights * (phonemes != criterion.ignore_index)).sum()


def check_schedule(scheduler, step, epochs, steps):
    """Will one of torch's schedulers be stepped as it was made for? A RunError says what to change.

    step: when it is stepped: after each "epoch", after each "batch", or with each epoch's "val_loss". steps: per epoch.
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
            f"{name} is made for {planned:,} steps, but with step={step!r} it is stepped {times:,} times: "
            f"{epochs:,} epochs of {steps:,} batches"
        )


@contextlib.contextmanager
def ignore_skipped_steps():
    """Without torch's warning that a schedule is stepped before the optimizer: float16 may have skipped its steps."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
        yield


# ---- Metrics -----------------------------------------------------------------------------------------------


def confusion_matrix(labels, predictions):
    """Counts, int64 (42, 42): row = true phoneme, column = predicted; both arguments integer (n,)."""
    n = len(PHONEMES)
    return np.bincount(
        np.asarray(labels, np.int64) * n + np.asarray(predictions), minlength=n * n
    ).reshape(n, n)


def accuracy_by_phoneme(confusion):
    """A table of a confusion matrix: each phoneme that occurs, its frames, its accuracy (0-1); the best one first."""
    frames = confusion.sum(1)
    table = pd.DataFrame(
        {"phoneme": PHONEMES, "frames": frames, "accuracy": confusion.diagonal() / frames.clip(1)}
    )
    return table[frames > 0].sort_values("accuracy", ascending=False)


def top_confusions(confusion, count=10):
    """A table of the most common confusions of a confusion matrix: which phonemes, how many frames, their shares."""
    wrong = confusion * (1 - np.eye(len(confusion), dtype=int))
    pairs = np.dstack(np.unravel_index(wrong.ravel().argsort()[::-1][:count], wrong.shape))[0]
    return pd.DataFrame(
        [
            {
                "true": PHONEMES[i],
                "taken for": PHONEMES[j],
                "frames": wrong[i, j],
                "% of its frames": 100 * wrong[i, j] / max(confusion[i].sum(), 1),
                "% of all errors": 100 * wrong[i, j] / max(wrong.sum(), 1),
            }
            for i, j in pairs
        ]
    )


def share_within_manners(confusion):
    """The share (0-1) of the errors in a confusion matrix between phonemes of one of the MANNERS; 0 without errors."""
    manner = np.array(
        [[phoneme in group for phoneme in PHONEMES] for group in MANNERS.values()], int
    )
    same = (manner.T @ manner).astype(bool)  # (42, 42); [SOS] and [EOS] are in no group
    right = confusion.diagonal().sum()
    return (confusion[same].sum() - right) / max(confusion.sum() - right, 1)


def boundary_distance(labels, offsets):
    """Frames from each frame to the nearest phone boundary of its utterance, int64 (n,); 0 beside the boundary.

    labels: integer (n,). offsets: (utterances + 1,), the first frame of each utterance, and n. The ends of an utterance
    are boundaries too.
    """
    labels, offsets = np.asarray(labels), np.asarray(offsets)
    new = np.concatenate(([True], labels[1:] != labels[:-1]))
    new[offsets[:-1]] = True
    boundaries = np.append(np.flatnonzero(new), len(labels))
    frame = np.arange(len(labels))
    phone = np.searchsorted(boundaries, frame, side="right")
    return np.minimum(frame - boundaries[phone - 1], boundaries[phone] - 1 - frame)


def calibration(confidences, correct, bins=10):
    """Is a confidence of 80% right 80% of the time? Equal bins of (0, 1] (Guo et al., "On Calibration", 2017).

    confidences: float (n,), probability of the predicted phoneme; correct: bool (n,).
    Returns mean confidence, accuracy (NaN where a bin is empty) and count, (bins,) each; expected calibration error.
    """
    confidences = np.asarray(confidences)
    which = np.digitize(confidences, np.linspace(0, 1, bins + 1)[1:-1], right=True)
    count = np.bincount(which, minlength=bins)
    with np.errstate(invalid="ignore"):  # 0 / 0 in an empty bin
        confidence, accuracy = (
            np.bincount(which, weights, bins) / count for weights in (confidences, correct)
        )
    return (
        confidence,
        accuracy,
        count,
        float(np.nansum(np.abs(confidence - accuracy) * count) / count.sum()),
    )


# ---- Figures -----------------------------------------------------------------------------------------------


def set_up_notebook():
    """Let figures appear in the notebook, whatever MPLBACKEND says, and tqdm not warn of missing widgets."""
    from IPython import get_ipython

    if shell := get_ipython():
        shell.run_line_magic("matplotlib", "inline")
    warnings.filterwarnings("ignore", "IProgress not found")  # its bar is of text then


def draw_frames(axis, frames):
    """Draw MFCCs (T, k) along time into matplotlib's axis: red above the mean, blue below."""
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


def draw_phones(axis, labels, color="black"):
    """Write the phonemes of labels (T,), an array, along time into an axis of matplotlib, where there is room."""
    boundaries = [0, *(np.flatnonzero(np.diff(labels)) + 1), len(labels)]
    for first, end in zip(boundaries, boundaries[1:]):
        axis.axvline(first, color="lightgrey", linewidth=0.5)
        if end - first > 3:
            axis.text(
                (first + end) / 2,
                0.5,
                PHONEMES[labels[first]].strip("[]"),
                ha="center",
                va="center",
                fontsize=9,
                color=color,
            )
    axis.set(ylim=(0, 1), yticks=[])


# ---- Decoding ----------------------------------------------------------------------------------------------


def count_transitions(labels, offsets, states=40):
    """How often each phoneme occurs, and what follows it from frame to frame inside the utterances; add-one smoothed.

    labels: integer (n,), below `states`: the 40 phonemes, as no frame is [SOS] or [EOS]. offsets: (utterances + 1,),
    the first frame of each utterance, and n.
    Returns log probabilities, float32: (states,), and (states, states), row = a frame's phoneme, column = the next's.
    """
    labels = labels.long()
    inside = torch.ones(len(labels), dtype=torch.bool, device=labels.device)
    inside[offsets[:-1]] = False  # the first frame of an utterance follows nothing
    pairs = (labels[:-1] * states + labels[1:])[inside[1:]]
    counts = torch.bincount(pairs, minlength=states**2).view(states, states).float() + 1
    prior = torch.bincount(labels, minlength=states).float() + 1
    return (prior / prior.sum()).log(), (counts / counts.sum(1, keepdim=True)).log()


def viterbi(scores, transitions, offsets):
    """The best path through each utterance, int64 (n,).

    scores: float32 (n, k) for each frame and state. transitions: float32 (k, k), row = from, column = to.
    offsets: (utterances + 1,), the first frame of each utterance, and n.
    """
    device, states = scores.device, scores.shape[1]
    lengths, order = offsets.diff().sort(descending=True)
    first = offsets[:-1][order].to(device)
    lengths = np.array(lengths.tolist())
    active = (
        (lengths > np.arange(lengths[0])[:, None]).sum(1).tolist()
    )  # how many utterances have a frame t
    best = scores.clone()  # the score of the best path to each state, up to a constant of the frame
    for t in range(1, len(active)):
        frame = first[: active[t]] + t
        total = (best[frame - 1].unsqueeze(2) + transitions).amax(1)
        best[frame] += total - total.amax(1, keepdim=True)  # small numbers stay exact
    # backwards, the state before a known one is the best one for it; behind the last frame there is none
    to_next = torch.cat([transitions.T, torch.zeros(1, states, device=device)])
    state = torch.full((len(first),), states, device=device)
    path = torch.empty(len(scores), dtype=torch.int64, device=device)
    for t in reversed(range(len(active))):
        frame = first[: active[t]] + t
        state[: active[t]] = path[frame] = (best[frame] + to_next[state[: active[t]]]).argmax(1)
    return path


class Decoder:
    """Viterbi with the transitions of the labels (n,) and offsets (utterances + 1,) of the training set.

    A frame's score is its log posterior - `prior_scale` x the log prior; a step's is `transition_weight` x the log
    probability of the transition, as in a hybrid HMM (Bourlard and Morgan, "Connectionist Speech Recognition", 1994).

    Example:
        decoder = Decoder(train_data.labels, train_data.offsets)
        val_indexes = decoder.tune(val_log_posteriors, val_data.labels, val_data.offsets)
        test_indexes = decoder(test_log_posteriors, test_data.offsets)
    """

    def __init__(self, labels, offsets, prior_scale=0.0, transition_weight=1.0):
        self.prior, self.transitions = count_transitions(labels, offsets)
        self.prior_scale, self.transition_weight = prior_scale, transition_weight

    def __call__(self, log_posteriors, offsets):
        """Log posteriors, float32 (n, 42) -> indexes of the 40 phonemes, int64 (n,)."""
        prior = self.prior.to(log_posteriors.device)
        scores = log_posteriors[:, : len(prior)] - self.prior_scale * prior
        return viterbi(scores, self.transition_weight * self.transitions.to(scores.device), offsets)

    def save(self, path):
        """Write it to a file, for `load`: then no training labels are needed."""
        save_checkpoint(path, {"config": {}, **vars(self)})

    @classmethod
    def load(cls, path):
        """A decoder from a file of `save`; None where there is none."""
        if (state := load_checkpoint(path)) is None:
            return None
        decoder = cls.__new__(cls)
        vars(decoder).update({name: each for name, each in state.items() if name != "config"})
        return decoder

    def tune(self, log_posteriors, labels, offsets, frames=200_000):
        """Set `prior_scale` and `transition_weight` to the pair that gets the most frames right.

        It is chosen on about `frames` frames at most, of utterances from all over the set. log_posteriors: float32
        (n, 42). labels: integer (n,). Returns indexes of phonemes, int64 (n,), that can be judged fairly against the
        labels: each half of the utterances is decoded with the pair that is best on the other half.
        """
        step = 2 * max(1, round(len(labels) / frames))
        utterance = torch.repeat_interleave(offsets.diff())  # of each frame
        labels = labels.to(log_posteriors.device)
        pairs = [*itertools.product((0, 0.15, 0.3, 0.45), (0.25, 0.5, 0.75, 1, 1.5))]

        def part(first, step):
            """Every step-th utterance from the first-th on: which frames these are, and their offsets."""
            inside = (utterance % step == first).to(log_posteriors.device)
            return inside, torch.cat([offsets[:1], offsets.diff()[first::step].cumsum(0)])

        def count(pair, inside, part_offsets):
            self.prior_scale, self.transition_weight = pair
            return (self(log_posteriors[inside], part_offsets) == labels[inside]).sum().item()

        halves = (0, 1) if len(offsets) > 2 else (0,)  # a single utterance is all there is
        right = {half: [count(pair, *part(half, step)) for pair in pairs] for half in halves}
        path = torch.empty_like(labels, dtype=torch.int64)
        for half in halves:
            others = right[halves[-1 - half]]
            self.prior_scale, self.transition_weight = pairs[int(np.argmax(others))]
            inside, part_offsets = part(half, len(halves))
            path[inside] = self(log_posteriors[inside], part_offsets)
        self.prior_scale, self.transition_weight = pairs[
            int(np.argmax(np.sum([*right.values()], axis=0)))
        ]
        return path


# ---- Checkpoint ---------------------------------------------------------------------------------

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

_RUN_LOCKS = weakref.WeakValueDictionary()  # path -> lock


def lock_run(folder, say=print):
    """Lock a run's folder for this process, until the returned file is closed or garbage-collected; again is harmless.

    Where there are no locks, `say` gets a warning. Raises a RunError if another process holds the lock.
    """
    path = Path(folder).resolve() / ".lock"
    lock = _RUN_LOCKS.get(path)
    if lock is None or lock.closed:
        lock = take_lock(path, say)
    if lock is None:
        raise RunError(
            f"{folder}: another notebook is training in this folder. Stop it (Kernel > Shut Down), or give "
            "this run another config['Name']."
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


def _set_by(config, key, switches):
    """A remark on the switch that may have set the value of a key in a config; "" if there is none.

    switches: see `load_checkpoint`.
    """
    for (switch, value), changes in switches.items():
        is_on = config.get(switch) == value
        if is_on and key in changes and changes[key] == config.get(key):
            return f" (config[{switch!r}] = {value!r} may have set it)"
    return ""


def _config_differences(saved, config, free, off, switches):
    """A line for each key whose value differs between two configs, except for the keys in `free`.

    off, switches: see `load_checkpoint`.
    """
    lines = []
    for key in dict.fromkeys([*config, *saved]):  # each key once
        there = saved.get(key, off.get(key))
        now = config.get(key, off.get(key))
        if key in free or there == now:
            continue
        in_both = key in saved and key in config
        if not in_both and not there and not now:  # 0, False, None: off in either case
            continue
        line = f"{key}: {there!r} there{_set_by(saved, key, switches)}, "
        line += f"{now!r} now{_set_by(config, key, switches)}"
        if key not in saved:
            line += " (a key that was added since)"
        lines.append(line)
    return lines


def _check_same_config(path, saved, config, planned, off, switches):
    """Raise a RunError that lists the differences if a run may not be resumed with this config.

    saved: the config in the checkpoint. The other arguments: see `load_checkpoint`.
    """
    free = KEYS_FREE_ON_RESUME
    if not planned and config["dropout_scale"] != "auto":
        free = (*free, "epochs")
    differences = _config_differences(saved, config, free, off, switches)
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


def load_checkpoint(path, config=None, planned=True, off=None, switches=None):
    """The dict that `save_checkpoint` has written, read onto the CPU; None if there is no file.

    config: that of the run to be resumed. It must agree with the config in the checkpoint, except
    for KEYS_FREE_ON_RESUME, and for "epochs" unless the training is planned for their number.
    planned: is the schedule planned for the number of epochs? With dropout_scale "auto" the
    training always is.
    off: {key: its value in runs from before it existed}; for other keys that is 0, False or None.
    switches: {(key, value): {key: value}}: if the first key has the first value, it sets the
    others. Only the message mentions them.
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
        _check_same_config(path, saved, config, planned, off or {}, switches or {})
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


def make_practice_corpus(root, utterances=(370, 52, 52), seed=23):
    """Make a corpus in the course's layout, spoken by eSpeak NG: the same seed, the same bytes.

    root: its folder, which appears when everything is written. ROOT/answers.csv (`id,label`) has
    the phonemes of the test frames.
    utterances: of train, dev and test, at least 1 each; the defaults make half an hour of speech.
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
