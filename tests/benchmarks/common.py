"""What the benchmarks share: the report, a corpus, and the usual way of loading and training.

"The usual way" is what the public notebooks of this homework do, in our own words: a list of
utterances concatenated and padded, one frame per `__getitem__`, stacked by `collate_fn`, `.item()`
in every step.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ["TQDM_DISABLE"] = "1"  # before tqdm is imported
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torchaudio  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils.data import DataLoader, Dataset  # noqa: E402

import helpers  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FULL = (28539, 2703, 2620)  # utterances of the real data in train, dev, test
FULL_FRAMES = (36_091_157, 1_928_204, 1_934_138)


# ---- Report --------------------------------------------------------------------------------------


def cpu_name():
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def report(title, **facts):
    """Print the title, the machine and versions, and what was measured on."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout
    print(f"# {title}\n")
    rows = {
        "CPU": f"{cpu_name()}, {os.cpu_count()} cores, {memory:.0f} GiB, "
        f"{torch.get_num_threads()} threads",
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu",
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, torchaudio "
        f"{torchaudio.__version__}, numpy {np.__version__}",
        "commit": commit[:12],
        "load average": f"{os.getloadavg()[0]:.1f} (what else runs makes the figures worse)",
        **facts,
    }
    for name, value in rows.items():
        print(f"{name + ':':15} {value}")
    print(flush=True)


def fresh_process(script, *arguments):
    """Run a script in a process of its own; what the last line it prints says in JSON."""
    command = [sys.executable, script, *map(str, arguments)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def alternate(sides, runs):
    """Call each of the sides, {name: function that gives a number}, in turn, `runs` times.

    Returns {name: its numbers}.
    """
    results = {name: [] for name in sides}
    for _ in range(runs):
        for name, measure in sides.items():
            results[name].append(measure())
    return results


def spread(values, digits=0):
    """Median [lowest - highest]."""
    low, middle, high = (
        f"{value:,.{digits}f}" for value in (min(values), statistics.median(values), max(values))
    )
    return f"{middle} [{low} - {high}]"


def print_table(results, unit, digits=0, faster="high"):
    """A row for each side: median [min - max], and how many times as good as the first it is."""
    base = statistics.median(next(iter(results.values())))
    for name, values in results.items():
        ratio = statistics.median(values) / base
        times = ratio if faster == "high" else 1 / ratio
        print(f"{name:36} {spread(values, digits):>38} {unit}   x {times:.2f}")
    print(flush=True)


def clock():
    """Seconds, after the GPU has finished: the clock shows the work and not the queueing of it."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_memory():
    """The most memory (resident, mapped files included) this process has had, in bytes. Linux."""
    status = Path(
        "/proc/self/status"
    ).read_text()  # not getrusage: a child inherits its parent's maximum there
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


# ---- Corpus --------------------------------------------------------------------------------------


def parser(description, utterances):
    """An argument parser with the choice of the data."""
    result = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    data = result.add_mutually_exclusive_group()
    data.add_argument("--data", type=Path, help="a folder in the course's layout")
    data.add_argument(
        "--utterances",
        type=int,
        nargs=3,
        metavar=("TRAIN", "DEV", "TEST"),
        default=utterances,
        help="size of the corpus that is made",
    )
    data.add_argument(
        "--full",
        dest="utterances",
        action="store_const",
        const=FULL,
        help="a corpus of the real data's size",
    )
    result.add_argument(
        "--random",
        action="store_true",
        help="random numbers in place of synthetic speech: made in seconds, needs no eSpeak NG",
    )
    result.add_argument(
        "--folder",
        type=Path,
        help="where the corpus is kept for the next time; else a temporary one",
    )
    result.add_argument("--runs", type=int, default=3, help="runs of each side")
    return result


@contextlib.contextmanager
def corpus(arguments):
    """The data folder that the arguments ask for, made if need be: (folder, description)."""
    if arguments.data:
        yield arguments.data, f"{arguments.data}"
        return
    with tempfile.TemporaryDirectory() as temporary:
        utterances = tuple(arguments.utterances)
        random = arguments.random or importlib.util.find_spec("espeakng_loader") is None
        kind = "random" if random else "practice"
        folder = (arguments.folder or Path(temporary)) / f"{kind}-{'-'.join(map(str, utterances))}"
        start = time.perf_counter()
        if folder.exists():
            made = "kept from an earlier run"
        else:
            folder.parent.mkdir(parents=True, exist_ok=True)
            make = random_corpus if random else helpers.make_practice_corpus
            make(folder, utterances)
            made = f"made in {time.perf_counter() - start:.1f} s"
        yield folder, f"{kind} corpus, {utterances} utterances in train, dev, test, {made}"


def random_corpus(root, utterances, seed=23):
    """Random MFCC files in the course's layout, on average as long as the real utterances.

    The labels stay for a few frames. A frame is its phoneme's mean plus noise, so that there is
    something to learn. The columns are HTK's: liftered, c0 last and large.
    """
    partial = root.with_name(root.name + ".partial")
    names = np.array(helpers.PHONEMES[:-2], "<U5")
    means = np.random.default_rng(seed).standard_normal((len(names), 28), np.float32)
    factors = helpers.columns_of("HTK", 28)[1].numpy()
    loudness = np.float32([0] * 27 + [118])
    jobs = []
    for p, (partition, n) in enumerate(zip(helpers.PARTITIONS, utterances)):
        for kind in ("mfcc",) if partition == "test-clean" else ("mfcc", "transcript"):
            (partial / partition / kind).mkdir(parents=True, exist_ok=True)
        total = round(n * FULL_FRAMES[p] / FULL[p])
        lengths = np.random.default_rng((seed, p)).uniform(0.3, 1.7, n)
        ends = np.rint(lengths.cumsum() / lengths.sum() * total).astype(int)
        lengths = np.diff(ends, prepend=0)
        jobs += [(p, partition, i, length) for i, length in enumerate(lengths)]

    def write(job):
        p, partition, i, length = job
        rng = np.random.default_rng((seed, p, i))
        labels = np.repeat(rng.integers(len(names), size=length), rng.integers(3, 15, length))[
            :length
        ]
        mfcc = 2 * rng.standard_normal((length, 28), np.float32) + means[labels]
        np.save(partial / partition / "mfcc" / f"{i:06d}.npy", factors * mfcc + loudness)
        if partition != "test-clean":
            text = np.concatenate((["[SOS]"], names[labels], ["[EOS]"])).astype("<U5")
            np.save(partial / partition / "transcript" / f"{i:06d}.npy", text)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(write, jobs))
    partial.rename(root)


# ---- The usual way -------------------------------------------------------------------------------


class UsualDataset(Dataset):
    """The utterances of a partition end to end in one array; an item is one frame with its context.

    Args:
        masks: "FreqMask", "Both" or None, put on `share` of the batches in `collate`.
    """

    def __init__(self, root, partition="train-clean-100", context=50, masks=None, share=0.7):
        self.context = context
        folder = Path(root) / partition
        indexes = {phoneme: i for i, phoneme in enumerate(helpers.PHONEMES)}
        mfccs, labels = [], []
        for name in sorted(os.listdir(folder / "mfcc")):
            mfcc = np.load(folder / "mfcc" / name)
            mfcc = (mfcc - mfcc.mean(axis=0)) / (mfcc.std(axis=0) + 1e-8)
            mfccs.append(torch.tensor(mfcc, dtype=torch.float32))
        if partition != "test-clean":
            for name in sorted(os.listdir(folder / "transcript")):
                transcript = np.load(folder / "transcript" / name)[1:-1]
                labels.append(torch.tensor([indexes[phoneme] for phoneme in transcript]))
        self.frames = torch.cat(mfccs)
        self.labels = (
            torch.cat(labels) if labels else torch.zeros(len(self.frames), dtype=torch.int64)
        )
        self.length = len(self.frames)
        self.frames = nn.functional.pad(self.frames, (0, 0, context, context))
        self.set_masks(masks, share)

    def set_masks(self, masks, share):
        self.share, self.transforms = share, []
        if masks in ("FreqMask", "Both"):
            self.transforms.append(torchaudio.transforms.FrequencyMasking(4))
        if masks in ("TimeMask", "Both"):
            self.transforms.append(torchaudio.transforms.TimeMasking(8))

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        return self.frames[i : i + 2 * self.context + 1], self.labels[i]

    def collate(self, batch):
        frames, labels = zip(*batch)
        frames = torch.stack(frames)
        if self.transforms and np.random.rand() < self.share:
            frames = frames.transpose(
                1, 2
            )  # (B, 28, frames): torchaudio's masks want the frequencies first
            for transform in self.transforms:
                frames = transform(frames)
            frames = frames.transpose(1, 2)
        return frames, torch.tensor(labels)  # as the course's own starter notebook does it


def usual_loader(dataset, batch_size, workers):
    return DataLoader(
        dataset,
        batch_size,
        shuffle=True,
        num_workers=workers,
        collate_fn=dataset.collate,
        pin_memory=DEVICE == "cuda",
    )


def usual_train(model, batches, criterion, optimizer, scaler, dtype):
    """One epoch of the usual loop; the same network, loss and precision as ours."""
    model.train()
    total_loss = total_accuracy = 0
    for frames, labels in batches:
        frames, labels = frames.to(DEVICE), labels.to(DEVICE)
        optimizer.zero_grad()
        with torch.autocast(DEVICE, dtype=dtype, enabled=dtype != torch.float32):
            logits = model(frames)
            loss = criterion(logits, labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        total_loss += loss.item()
        total_accuracy += (logits.argmax(1) == labels).float().mean().item()
        del frames, labels, logits
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
    return total_loss, total_accuracy


def best_workers(measure):
    """The number of workers for which measure(number) is highest, and a report of the others."""
    speeds = {n: measure(n) for n in sorted({0, 2, min(8, os.cpu_count() or 1)})}
    return max(speeds, key=speeds.get), "the usual way has its best of " + ", ".join(
        f"{n}: {speed:,.0f} frames/s" for n, speed in speeds.items()
    )
