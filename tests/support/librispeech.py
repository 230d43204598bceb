"""Parquet files like those of LibriSpeech's alignments on the hub.

Without the package `datasets`, the tests that import this are skipped.
"""

import io

import numpy as np
import pytest

import helpers

datasets, pq, pa, soundfile = map(
    pytest.importorskip, ("datasets", "pyarrow.parquet", "pyarrow", "soundfile")
)
SPANS = pa.list_(
    pa.struct([("phoneme", pa.string()), ("start", pa.float64()), ("end", pa.float64())])
)
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("sex", pa.string()),
        ("subset", pa.string()),
        ("audio", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        ("transcript", pa.string()),
        ("phonemes", SPANS),
    ]
)
RATE = 16000
SEVEN = [
    ("sil", 0.0, 0.3),
    ("AA1", 0.3, 0.5),
    ("T", 0.5, 0.6),
    ("spn", 0.6, 0.8),
    ("UW0", 0.9, 1.1),
    ("NG", 1.1, 1.2),
    ("", 1.2, 1.4),
]


def flac(samples, rate=RATE):
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="FLAC")
    return file.getvalue()


def row(name, spans=SEVEN, seconds=1.4, rate=RATE, audio=None):
    if audio is None:
        audio = flac(
            np.random.default_rng(sum(name.encode())).normal(0, 0.1, int(seconds * rate)), rate
        )
    spans = spans and [dict(zip(("phoneme", "start", "end"), span)) for span in spans]
    return {
        "id": name,
        "sex": "",
        "subset": "x",
        "audio": {"bytes": audio, "path": f"{name}.flac"},
        "transcript": "",
        "phonemes": spans,
    }


def write(path, rows, schema=SCHEMA):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema), path, row_group_size=3)
    return path


def spoken(count):
    """Rows of synthetic speech, with the phones and times that the synthesiser reports."""
    rows = []
    for i in range(count):
        samples, phones = helpers.speak(*helpers.practice_utterance(0, i))
        spans = [(phone.replace("[SIL]", "sil"), start, end) for phone, start, end in phones]
        rows.append(row(f"{i}-1-0000", spans, audio=flac(samples, helpers.ESPEAK_RATE)))
    return rows
