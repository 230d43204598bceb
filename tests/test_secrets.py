"""No API key of wandb or Kaggle in any file of the repository, nor in a notebook's outputs."""

import json
import random
import re
import string
import subprocess

import pytest
from support.notebook import ROOT

# An old wandb key is as long as a git hash: what stands after one of these words is a hash.
HASH = (
    r"(?i:commit|sha-?1?|rev|revision|hash|digest|checksum|blob|tree|@|/raw|/archive)[\"'\s:=/]*$"
)
# A longer run of letters and digits, such as an image in base64, only contains 40 hexadecimal
# digits by chance.
ALONE = r"(?<![0-9A-Za-z+/]){}(?![0-9A-Za-z+/=])"
PATTERNS = {
    "wandb key": re.compile(
        ALONE.format(r"(?:local-)?(?=[0-9a-f]*[0-9])(?=[0-9]*[a-f])[0-9a-f]{40}")
    ),
    "wandb key, new": re.compile(r"wandb_v\d_[0-9A-Za-z_-]{20,}"),
    "Kaggle key": re.compile(
        r"(?i:kaggle_key|\bkey\b)[\\\"'\s\]:=,]{1,12}[0-9a-f]{32}(?![0-9A-Za-z])"
    ),
    "Kaggle token": re.compile(r"KGAT_[0-9A-Za-z_-]{20,}"),
}


def findings(text):
    """(kind, first characters) of whatever looks like a key in a text."""
    found = []
    for kind, pattern in PATTERNS.items():
        for match in pattern.finditer(text):
            if kind != "wandb key" or not re.search(
                HASH, text[max(0, match.start() - 20) : match.start()]
            ):
                found.append((kind, match.group()[:12] + "..."))
    return found


def texts(path):
    """The texts of a file; of a notebook, those of its cells and outputs, without images."""
    content = path.read_text("utf-8", errors="replace")
    if path.suffix != ".ipynb":
        return [content]

    def strings(value, key=""):
        if isinstance(value, dict):
            return [text for name, item in value.items() for text in strings(item, name)]
        if isinstance(value, list):
            if all(isinstance(item, str) for item in value):
                return strings("".join(value), key)
            return [text for item in value for text in strings(item, key)]
        return [value] if isinstance(value, str) and not key.startswith("image/") else []

    return strings(json.loads(content))


def files():
    """The files that git tracks or would add; outside a checkout all of them."""
    git = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    names = (
        git.stdout.split("\0")[:-1]
        if git.returncode == 0
        else [
            path.relative_to(ROOT)
            for path in ROOT.rglob("*")
            if not {".git", "runs", ".venv", ".venv-ci"} & set(path.relative_to(ROOT).parts)
        ]
    )
    return [ROOT / name for name in names if (ROOT / name).is_file()]


DRAW = random.Random(23)


def hexadecimal(length):
    return "a0" + "".join(DRAW.choices("0123456789abcdef", k=length - 2))


def random_text(length):
    return "".join(DRAW.choices(string.ascii_letters + string.digits, k=length))


def test_no_file_holds_a_key():
    checked = files()
    assert ROOT / "helpers.py" in checked and ROOT / "hw1p2_starter.ipynb" in checked
    found = {
        str(path.relative_to(ROOT)): keys
        for path in checked
        if (keys := [key for text in texts(path) for key in findings(text)])
    }
    assert not found


# made here, so that this file holds none
PLANTED = [
    'wandb.login(key="' + hexadecimal(40) + '")',
    "WANDB_API_KEY=" + hexadecimal(40),
    hexadecimal(40),
    "%env WANDB_API_KEY " + hexadecimal(40) + "\n",
    "wandb login local-" + hexadecimal(40),
    "key = '" + "wandb_v1_" + random_text(77) + "'",
    '{"username":"student","key":"' + hexadecimal(32) + '"}',
    "{'username': 'x', 'key': '" + hexadecimal(32) + "'}",
    r"{\"username\":\"x\",\"key\":\"" + hexadecimal(32) + r"\"}",
    "KAGGLE_KEY=" + hexadecimal(32),
    'os.environ["KAGGLE_KEY"] = "' + hexadecimal(32) + '"',
    "KAGGLE_API_TOKEN=" + "KGAT_" + hexadecimal(32),
]
HARMLESS = [
    "commit " + hexadecimal(40),
    '"git_commit": "' + hexadecimal(40) + '"',
    "git+https://x/y@" + hexadecimal(40),
    "sha256:" + hexadecimal(64),
    '"id": "' + hexadecimal(8) + '"',
    hexadecimal(32),
    "iVBOR" + random_text(5000) + "=",
    "ab+/" + hexadecimal(40) + "+/",
    "WANDB_API_KEY, WANDB_MODE",
    "0" * 40,
    'the key is "KAGGLE_KEY"',
    "wandb_v1_...",
]


@pytest.mark.parametrize("text", PLANTED, ids=range(len(PLANTED)))
@pytest.mark.parametrize("place", ["file", "source", "stream", "result"])
def test_a_planted_key_is_found(tmp_path, text, place):
    if place == "file":
        path = tmp_path / "settings.py"
        path.write_text(f"first line\n{text}\nlast line\n")
    else:
        lines = f"first line\n{text}\nlast line".splitlines(keepends=True)
        output = {
            "stream": {"output_type": "stream", "name": "stdout", "text": lines},
            "result": {"output_type": "execute_result", "data": {"text/plain": lines}},
        }.get(place)
        cell = {
            "cell_type": "code",
            "source": lines if output is None else [],
            "outputs": [output] if output else [],
        }
        path = tmp_path / "a.ipynb"
        path.write_text(json.dumps({"cells": [cell], "metadata": {}}))
    assert [key for content in texts(path) for key in findings(content)]


@pytest.mark.parametrize("text", HARMLESS, ids=range(len(HARMLESS)))
def test_there_are_no_false_alarms(text):
    assert not findings(f"first line\n{text}\nlast line\n")


def test_images_and_ids_in_notebooks_are_no_keys(tmp_path):
    image = {
        "output_type": "display_data",
        "data": {"image/png": hexadecimal(40), "text/plain": ["<Figure>"]},
    }
    cells = [{"cell_type": "code", "id": hexadecimal(8), "source": [], "outputs": [image]}]
    (tmp_path / "a.ipynb").write_text(json.dumps({"cells": cells}))
    assert not [key for text in texts(tmp_path / "a.ipynb") for key in findings(text)]
