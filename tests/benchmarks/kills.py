"""Kill training runs at N random moments, resume them, and compare what they leave at the end.

python tests/benchmarks/kills.py [N, default 100]
"""

import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]

from support import kills  # noqa: E402

import helpers  # noqa: E402


def main(wanted):
    random.seed(23)
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        data = folder / "corpus"
        helpers.make_practice_corpus(data, (24, 4, 3))
        references, seconds = {}, {}
        for i, (name, changes) in enumerate(kills.CONFIGS.items()):
            for attempt in range(2):  # the second one without the server's start: the time of a run
                started = time.perf_counter()
                child = kills.start(
                    folder / f"reference{i}-{attempt}", data, changes, pause=kills.PAUSE
                )
                child.join()
                seconds[name] = time.perf_counter() - started
            references[name] = kills.outcome(folder / f"reference{i}-0")
        tally, runs, identical = Counter(), 0, 0
        while tally.total() < wanted:
            name = list(kills.CONFIGS)[runs % len(kills.CONFIGS)]
            run, where = folder / f"run{runs}", ""
            while where is not None:
                child = kills.start(run, data, kills.CONFIGS[name], pause=kills.PAUSE)
                delay = random.uniform(0, 0.6 * seconds[name]) if tally.total() < wanted else 600
                where = kills.kill(child, run, delay)
                if where is not None:
                    tally["writing" if where.startswith("writing") else where] += 1
            runs += 1
            identical += kills.outcome(run) == references[name]
    print(f"{tally.total()} kills in {runs} runs, {time.perf_counter() - begin:.0f} s")
    for where in ("before training", "in an epoch", "writing", "after training"):
        label = "while writing a checkpoint" if where == "writing" else where
        print(f"{tally[where]:5d} {label}")
    print(
        f"all ended identical to a run that was never killed: "
        f"{'yes' if identical == runs else 'NO'} "
        f"({identical} of {runs})"
    )
    return identical == runs


if __name__ == "__main__":
    sys.exit(not main(int(sys.argv[1]) if len(sys.argv) > 1 else 100))
