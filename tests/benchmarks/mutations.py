"""Damage a small corpus at random: is it refused by name, or loaded as the files say?

python tests/benchmarks/mutations.py [NUMBER, default 2000] [SEED]
"""

import collections
import random
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]

from support import mutations  # noqa: E402

import helpers  # noqa: E402


def main(number=2000, seed=23):
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as temporary:
        helpers.make_practice_corpus(Path(temporary) / "practice", (1, mutations.UTTERANCES, 1))
        source = mutations.take_source(Path(temporary) / "practice", Path(temporary) / "source")
        counts = collections.Counter(mutations.attempt(source, rng) for _ in range(number))
    print(f"{'last mutation':20}{'loaded':>8}{'refused':>9}")
    for name in sorted({name for name, _ in counts}):
        print(f"{name:20}{counts[name, 'loaded']:8,}{counts[name, 'refused']:9,}")
    loaded = sum(count for (_, outcome), count in counts.items() if outcome == "loaded")
    print(f"{'all':20}{loaded:8,}{number - loaded:9,}")
    print(
        "loaded: exactly what the files hold; refused: a DataError that names a damaged file; "
        "nothing else happened"
    )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
