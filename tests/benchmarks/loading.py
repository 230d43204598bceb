"""How long does it take to load the data, and in how much memory?

The usual way and helpers.AudioDataset:

    python tests/benchmarks/loading.py                             a small corpus, about a minute
    python tests/benchmarks/loading.py --full --random --runs 1    random, of the real data's size
    python tests/benchmarks/loading.py --data 11785-s25-hw1p2      the real data

Every measurement has a process of its own. Time: all three partitions, without imports. Peak
memory: the process's maximum less that of a process that only imports, relative to the packed
arrays (float16 frames and uint8 labels). Targets: first load at least twice as fast as the usual
way; for the full set peak memory at most 1.3 x the packed arrays, and the second load within 3 s.
"""

import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import common
import torch

import helpers

SIDES = (
    "usual",
    "ours, no cache",
    "ours, first load, writes cache",
    "ours, second load",
    "ours, second load, all read",
)


def load(side, data, cache):
    """In the process that is measured: print seconds, peak memory and packed size as JSON."""
    packed, start = 0, time.perf_counter()
    if side == "usual":
        datasets = [common.UsualDataset(data, partition) for partition in helpers.PARTITIONS]
    elif side != "imports":
        cache = None if side == "ours, no cache" else cache
        datasets = [
            helpers.AudioDataset(data, partition, cache=cache) for partition in helpers.PARTITIONS
        ]
        if side.endswith("all read"):  # a mapped file is read when it is first used
            sum(
                torch.count_nonzero(dataset.frames.view(torch.int16)).item() for dataset in datasets
            )
        packed = sum(
            dataset.frames.nbytes + (0 if dataset.labels is None else dataset.labels.nbytes)
            for dataset in datasets
        )
    seconds = time.perf_counter() - start
    frames = sum(map(len, datasets)) if side != "imports" else 0
    print(
        json.dumps(
            {"seconds": seconds, "peak": common.peak_memory(), "packed": packed, "frames": frames}
        )
    )


def measure(side, data, cache):
    if side in ("ours, no cache", "ours, first load, writes cache"):
        shutil.rmtree(cache, ignore_errors=True)
    return common.fresh_process(__file__, "--side", side, "--data", data, "--cache", cache)


def main():
    parser = common.parser(__doc__.splitlines()[0], utterances=(400, 60, 60))
    parser.add_argument("--side", help="for internal use")
    parser.add_argument("--cache", help="for internal use")
    arguments = parser.parse_args()
    if arguments.side:
        return load(arguments.side, arguments.data, arguments.cache)
    with (
        common.corpus(arguments) as (data, description),
        tempfile.TemporaryDirectory() as temporary,
    ):
        cache = str(arguments.folder / "cache" if arguments.folder else Path(temporary) / "cache")
        imports = measure("imports", data, cache)["peak"]
        measure(
            "ours, no cache", data, cache
        )  # warm: the files are in the page cache for every side
        results = common.alternate(
            {side: lambda side=side: measure(side, data, cache) for side in SIDES}, arguments.runs
        )
        size = results["ours, no cache"][0]
        common.report(
            "Loading",
            data=f"{description}; {size['frames']:,} frames",
            packed=f"{size['packed'] / 1e6:,.1f} MB",
            runs=f"{arguments.runs} of each side, alternating, each in a fresh process; "
            "page cache warm",
        )
        print("Time to load all three partitions; how many times as fast as the first row")
        common.print_table(
            {side: [result["seconds"] for result in results[side]] for side in SIDES}, "s", 3, "low"
        )
        print(
            f"Peak memory above that of the imports ({imports / 1e6:.0f} MB); "
            "relative to the packed arrays"
        )
        for side in SIDES:
            peaks = [(result["peak"] - imports) / 1e6 for result in results[side]]
            relative = statistics.median(peaks) * 1e6 / size["packed"]
            print(f"{side:36} {common.spread(peaks):>38} MB  {relative:.2f} x packed")


if __name__ == "__main__":
    main()
