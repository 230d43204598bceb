"""Damage a small corpus many times and count how it is loaded or refused: python mutations.py [NUMBER] [SEED]."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]

from mutations import tally  # noqa: E402

if __name__ == "__main__":
    number, seed = (int(text) for text in (sys.argv[1:] + ["2000", "23"][len(sys.argv) - 1:])[:2])
    counts = tally(number, seed)
    print(f"{'last mutation':20}{'loaded':>8}{'refused':>9}")
    for name in sorted({name for name, _ in counts}):
        print(f"{name:20}{counts[name, 'loaded']:8,}{counts[name, 'refused']:9,}")
    loaded = sum(count for (_, outcome), count in counts.items() if outcome == "loaded")
    print(f"{'all':20}{loaded:8,}{number - loaded:9,}")
    print("loaded: exactly what the files hold; refused: a DataError that names a damaged file; nothing else happened")
