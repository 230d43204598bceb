"""Random damage to a small corpus: it is either loaded as the files say, or refused by name."""

import contextlib
import io
import shutil
import tempfile
import warnings
from pathlib import Path

import numpy as np

import helpers
from support import reference

PARTITION = "dev-clean"
UTTERANCES = 3
DTYPES = {
    "mfcc": ["<f2", "<f8", ">f4", ">f8", "<i4", "u1", "<c8", "?", "S8", "<U8", "O", "g", "M8[s]"],
    "transcript": [">U5", "<U2", "<U9", "S5", "O", "<U0"],
}
TEXTS = [
    "[SOS]",
    "[EOS]",
    "[SIL]",
    "ZH",
    "aa",
    "AA ",
    "",
    "XX",
    "[SIL",
    "\u00e9",
    "\U0010ffff",
    "A\0A",
]
VALUES = [np.nan, np.inf, -np.inf, 1e300, -1e300, 1e160, 3e38, 1e30, -0.0, 1e-300]
HEADERS = [
    (b"<f4", b"<f2"),
    (b"<f4", b"<i4"),
    (b"<f4", b">f4"),
    (b"<f4", b"|O4"),
    (b"<f4", b"<f9"),
    (b"<f4", b"'f4"),
    (b"<f4", b"\\f4"),
    (b"<U5", b"<U4"),
    (b"<U5", b">U5"),
    (b"<U5", b"<i5"),
    (b"False", b"True "),
    (b"False", b"Fals "),
    (b"False", b"1    "),
    (b", 28)", b", 27)"),
    (b", 28)", b",28L)"),
    (b", 28)", b",-28)"),
    (b"(", b"["),
    (b"descr", b"Descr"),
    (b"{", b" "),
    (b"NUMPY", b"NUMPX"),
    (b"\n", b"#"),
    (b"28", b"8_"),
]


def choose_file(rng, folder):
    return rng.choice(sorted(path for path in folder.rglob("*.npy") if path.is_file()))


def write(path, array, **options):
    with open(path, "wb") as file:
        np.lib.format.write_array(file, array, **options)


def read(path):
    try:
        return np.load(path, allow_pickle=False)
    except Exception:  # damaged before
        return np.zeros((4, 28), np.float32)


# Each mutation changes the file `path`, or others of its partition. It returns the files of which a
# refusal must name one; without a return value that is `path`.


def truncate(rng, path):
    data = path.read_bytes()
    path.write_bytes(data[: rng.randrange(max(len(data), 1))])


def append(rng, path):
    path.write_bytes(
        path.read_bytes() + bytes(rng.randrange(256) for _ in range(rng.randint(1, 8)))
    )


def flip_bytes(rng, path):
    data = bytearray(path.read_bytes())
    in_header = rng.random() < 0.5
    for _ in range(rng.randint(1, 4)):
        if data:
            data[rng.randrange(min(128, len(data)) if in_header else len(data))] ^= rng.randint(
                1, 255
            )
    path.write_bytes(data)


def overwrite_bytes(rng, path):
    data = path.read_bytes()
    first, length = rng.randrange(max(len(data), 1)), rng.randint(1, 400)
    noise = np.random.default_rng(rng.randrange(2**32)).bytes(length)
    path.write_bytes(data[:first] + noise[: len(data) - first] + data[first + length :])


def change_header(rng, path):
    old, new = rng.choice(HEADERS)
    path.write_bytes(path.read_bytes().replace(old, new, 1))


def change_dtype(rng, path):
    dtype = rng.choice(DTYPES[path.parent.name])
    with contextlib.suppress(ValueError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write(path, read(path).astype(dtype), version=rng.choice([None, None, (2, 0), (3, 0)]))


def change_shape(rng, path):
    array = read(path)
    change = rng.choice(
        [
            np.transpose,
            np.ravel,
            lambda a: a[None],
            lambda a: a[..., None],
            lambda a: a[..., :-1],
            lambda a: a[:0],
            lambda a: a[:-1],
            lambda a: a[1:],
            lambda a: a[::-1],
            lambda a: np.concatenate([a, a[-1:]]),
            lambda a: np.concatenate([a, a[..., -1:]], -1),
            lambda a: a[0],
            lambda a: a[:1],
            lambda a: a[:3],
        ]
    )
    with contextlib.suppress(ValueError, IndexError):
        write(path, np.array(change(array)))


def change_order(rng, path):
    write(path, np.asfortranarray(read(path)))


def swap_files(rng, path):
    second = choose_file(rng, path.parents[1])
    a, b = path.read_bytes(), second.read_bytes()
    path.write_bytes(b)
    second.write_bytes(a)
    names = {path.name, second.name}  # lengths are compared in the transcript's name
    return [path.parents[1] / kind / name for kind in ("mfcc", "transcript") for name in names]


def delete(rng, path):
    path.unlink()


def rename(rng, path):
    name = rng.choice(
        ["0.npy", "z.npy", ".npy", "._" + path.name, path.name + ".bak", "Thumbs.db", "\udcff.npy"]
    )
    both = rng.random() < 0.5
    moved = [
        path.parents[1] / kind / path.name
        for kind in ("mfcc", "transcript")
        if both or kind == path.parent.name
    ]
    for old in moved:
        if old.exists():
            old.rename(old.with_name(name))
    return [*moved, *(old.with_name(name) for old in moved)]


def replace_by_folder(rng, path):
    path.unlink()
    if rng.random() < 0.5:
        path.mkdir()
    else:
        path.symlink_to(path.with_suffix(".nowhere"))


def change_labels(rng, path):
    path = path.parents[1] / "transcript" / path.name
    if path.is_file():
        transcript = read(path).astype("<U5").ravel()
        for _ in range(rng.randint(1, 3)):
            if len(transcript):
                transcript[rng.choice([0, -1, rng.randrange(len(transcript))])] = rng.choice(TEXTS)
        write(path, transcript)
    return [path]


def change_values(rng, path):
    path = path.parents[1] / "mfcc" / path.name
    if path.is_file() and read(path).dtype.kind in "fiu":
        with np.errstate(all="ignore"):
            mfcc = np.atleast_2d(read(path)).astype(rng.choice(["<f4", "<f8"]))
            for _ in range(rng.randint(1, 3) if mfcc.ndim == 2 and mfcc.size else 0):
                place = rng.randrange(len(mfcc)), rng.randrange(mfcc.shape[1])
                mfcc[rng.choice([place, place[0], (slice(None), place[1])])] = rng.choice(VALUES)
        write(path, mfcc)
    return [path]


MUTATIONS = [
    truncate,
    append,
    flip_bytes,
    flip_bytes,
    overwrite_bytes,
    overwrite_bytes,
    change_header,
    change_dtype,
    change_shape,
    change_order,
    swap_files,
    delete,
    rename,
    replace_by_folder,
    change_labels,
    change_values,
]


def take_source(root, folder):
    """Copy the shortest utterances of a corpus to `folder`, the source for `attempt`."""
    mfccs = sorted((root / PARTITION / "mfcc").iterdir(), key=lambda path: path.stat().st_size)[
        :UTTERANCES
    ]
    for kind in ("mfcc", "transcript"):
        (folder / PARTITION / kind).mkdir(parents=True)
        for path in mfccs:
            shutil.copy(root / PARTITION / kind / path.name, folder / PARTITION / kind)
    return folder


def attempt(source, rng):
    """Copy, mutate (once, or a few times), load, compare.

    Returns (name of the last mutation, "loaded" or "refused"). Raises AssertionError where what is
    loaded is not what the files hold, or a refusal names no file; any exception
    other than DataError passes through.
    """
    with tempfile.TemporaryDirectory() as temporary:
        root = shutil.copytree(source, Path(temporary) / "corpus")
        touched = []
        for _ in range(rng.choice([1, 1, 1, 2, 3])):
            mutation = rng.choice(MUTATIONS)
            if any(path.is_file() for path in root.rglob("*.npy")):
                path = choose_file(rng, root / PARTITION)
                touched += mutation(rng, path) or [path]
        cache = Path(temporary) / "cache" if rng.random() < 0.25 else None
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                dataset = helpers.AudioDataset(root, PARTITION, context=3, cache=cache)
            except helpers.DataError as error:
                message = str(error)
                named = [
                    path
                    for path in touched
                    if path.name.encode(errors="backslashreplace").decode() in message
                ]
                assert (
                    named or f"{root / PARTITION / 'mfcc'}: there are no .npy files" in message
                ), (touched, message)
                return mutation.__name__, "refused"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            utterances = reference.read_partition(
                root, PARTITION
            )  # a ValueError: this should have been refused
        assert dataset.utterances == len(utterances)
        for i, (mfcc, labels) in enumerate(utterances):
            frames, phonemes = dataset.utterance(i)
            np.testing.assert_allclose(
                frames.double().numpy(), mfcc, reference.FLOAT16["rtol"], 1e-6
            )
            assert phonemes.tolist() == labels
        return mutation.__name__, "loaded"
