"""Kill a training run N times at random moments and tell whether it ends as if nothing had happened.

Usage: python tests/benchmarks/kills.py [N, default 100]
"""

import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]

import killing  # noqa: E402

import helpers  # noqa: E402

PAUSE = 0.03  # seconds at each of the five steps of writing a checkpoint: about a third of a run is writing
CONFIGS = {"adamw, cosineanneal": killing.CHANGES,
           "sgd, reducelronplateau": {**killing.CHANGES, "optimizers": "sgd", "scheduler": "reducelronplateau"}}


def main(kills):
    random.seed(23)
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        data = folder / "corpus"
        helpers.make_practice_corpus(data, (24, 4, 3))
        references, seconds = {}, {}
        for i, (name, changes) in enumerate(CONFIGS.items()):
            for attempt in range(2):  # the second one without the server's start: the time of a run
                start = time.perf_counter()
                child = killing.start(folder / f"reference{i}-{attempt}", data, changes, pause=PAUSE)
                child.join()
                seconds[name] = time.perf_counter() - start
            references[name] = killing.outcome(folder / f"reference{i}-0")
        tally, resumes, runs, identical = Counter(), 0, 0, 0
        while tally.total() < kills:
            name = list(CONFIGS)[runs % len(CONFIGS)]
            run, place = folder / f"run{runs}", ""
            while place is not None:
                child = killing.start(run, data, CONFIGS[name], pause=PAUSE)
                delay = random.uniform(0, 0.6 * seconds[name]) if tally.total() < kills else 600
                place = killing.kill(child, run, delay)
                tally[place.split(" checkpoint.pt")[0].split(" best.pt")[0] if place else None] += 1
                del tally[None]
                resumes += place is not None
            runs += 1
            identical += killing.outcome(run) == references[name]
    print(f"{tally.total()} kills in {runs} runs, {resumes} resumes, {time.perf_counter() - begin:.0f} s")
    for place in ("before training", "in an epoch", "writing", "after training"):
        label = "while writing a checkpoint" if place == "writing" else place
        print(f"{tally[place]:5d} {label}")
    print(f"all ended identical to a run that was never killed: {'yes' if identical == runs else 'NO'} "
          f"({identical} of {runs})")
    return identical == runs


if __name__ == "__main__":
    sys.exit(not main(int(sys.argv[1]) if len(sys.argv) > 1 else 100))
