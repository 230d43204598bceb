"""The submission: written, checked, and handed in with a fake kaggle command."""

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pandas as pd
import pytest
from support.damage import FOREIGN, damaged_by
from support.notebook import definitions

import helpers
from helpers import (
    PHONEMES,
    DataError,
    RunError,
    check_sample_submission,
    read_submission,
    submit,
)
from helpers import write_submission as write

PYTHON, FIND_SPEC = sys.executable, helpers.importlib.util.find_spec
NAMES = np.array(PHONEMES)[[0, 1, 5, 39, 0, 0, 22]]


# ---- The file ------------------------------------------------------------------------------------


def test_the_bytes_that_kaggle_takes(tmp_path):
    path = tmp_path / "runs" / "a" / "submission.csv"
    write(path, NAMES)
    lines = [f"{i},{name}" for i, name in enumerate(NAMES)]
    assert path.read_bytes() == ("id,label\n" + "\n".join(lines) + "\n").encode("ascii")
    assert lines[0] == "0,[SIL]"
    assert [path.name for path in path.parent.iterdir()] == ["submission.csv"]
    assert read_submission(path, len(NAMES)).tolist() == NAMES.tolist()


@pytest.mark.parametrize("rows", [1, 100_000])
def test_reading_gives_what_was_written(tmp_path, rows):
    names = np.array(PHONEMES[:40])[np.random.default_rng(0).integers(0, 40, rows)]
    write(tmp_path / "a.csv", names)
    assert read_submission(tmp_path / "a.csv", rows).tolist() == names.tolist()
    table = pd.read_csv(tmp_path / "a.csv")
    assert table["id"].tolist() == list(range(rows)) and table["label"].tolist() == names.tolist()


GOOD = "id,label\n0,AA\n1,[SIL]\n2,ZH\n"
BAD = {  # what: (content, words of the message)
    "wrong header": (
        GOOD.replace("label", "phoneme"),
        "the header is 'id,phoneme'; expected id,label",
    ),
    "no header": (GOOD[9:], "the header is '0,AA'; expected id,label"),
    "swapped columns": ("label,id\nAA,0\n", "the header is 'label,id'"),
    "three columns": ("id,label,more\n0,AA,1\n", "the header is 'id,label,more'"),
    "a third value": (
        "id,label\n0,AA,1\n1,AA,1\n2,AA,1\n",
        "line 2 is '0,AA,1'; expected the id 0",
    ),
    "a value before": ("id,label\nx,0,AA\nx,1,AA\nx,2,AA\n", "line 2 is 'x,0,AA'; expected"),
    "a third value later": (GOOD + "3,AA,1\n", "line 5 is '3,AA,1'; expected the id 3"),
    "missing id": (GOOD.replace("1,[SIL]\n", "") + "3,AA\n", "line 3 is '2,ZH'; expected the id 1"),
    "ids from 1": ("id,label\n1,AA\n2,AA\n3,AA\n", "line 2 is '1,AA'; expected the id 0"),
    "an id twice": ("id,label\n0,AA\n0,AA\n2,AA\n", "line 3 is '0,AA'; expected the id 1"),
    "an id with zeros": ("id,label\n0,AA\n01,AA\n2,AA\n", "line 3 is '01,AA'; expected the id 1"),
    "ids as decimals": (
        "id,label\n0.0,AA\n1.0,AA\n2.0,AA\n",
        "line 2 is '0.0,AA'; expected the id 0",
    ),
    "unknown label": (
        GOOD.replace("ZH", "ZZ"),
        "line 4 is '2,ZZ'; expected the id 2 and the name of a phoneme",
    ),
    "an index for a label": (
        GOOD.replace("ZH", "39"),
        "line 4 is '2,39'; expected the id 2 and the name of a phoneme",
    ),
    "empty label": (GOOD.replace("ZH", ""), "line 4 is '2,';"),
    "no label": (GOOD.replace(",ZH", ""), "line 4 is '2"),
    "NaN": (GOOD.replace("ZH", "NaN"), "line 4 is '2,NaN';"),
    "blank before the label": (GOOD.replace("ZH", " ZH"), "line 4 is '2, ZH';"),
    "too few rows": (GOOD[:-5], "2 rows; expected 3, one for each frame of test-clean"),
    "too many rows": (GOOD + "3,AA\n", "4 rows; expected 3"),
    "no rows": ("id,label\n", "0 rows; expected 3"),
    "empty": ("", "the header is ''; expected id,label"),
    "an open quote": (GOOD + '3,"AA\n', "line 5 is '3,AA\\n'; expected the id 3"),
    "a web page": ("<!DOCTYPE html>\n<html></html>\n", "the header is '<!DOCTYPE html>'"),
}


@pytest.mark.parametrize("content, words", BAD.values(), ids=BAD)
def test_what_kaggle_would_not_take(tmp_path, content, words):
    path = tmp_path / "submission.csv"
    path.write_text(content, newline="")
    with pytest.raises(DataError) as caught:
        read_submission(path, 3)
    assert str(path) in str(caught.value) and words in str(caught.value)


@damaged_by(FOREIGN)
def test_what_is_no_csv_at_all(tmp_path, damage):
    (tmp_path / "submission.csv").write_bytes(damage(1000 * GOOD.encode()))
    with pytest.raises(DataError, match="submission.csv") as caught:
        read_submission(tmp_path / "submission.csv")
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize(
    "content",
    [
        GOOD,
        GOOD.replace("\n", "\r\n"),
        GOOD.rstrip(),
        GOOD + "\n",
        '"id","label"\n' + GOOD[9:],
        "\ufeff" + GOOD,  # Excel's mark
    ],
)
def test_what_kaggle_takes_too(tmp_path, content):
    (tmp_path / "a.csv").write_text(content, "utf-8", newline="")
    assert read_submission(tmp_path / "a.csv", 3).tolist() == ["AA", "[SIL]", "ZH"]


@pytest.mark.parametrize("name", ["sample_submission.csv", "test-clean/test_sample_submission.csv"])
def test_a_sample_submission_that_does_not_fit_is_named(tmp_path, name):
    check_sample_submission(tmp_path, 3)  # there is none
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    for rows in ("0,AA\n1,AA\n2,AA\n", "2,AA\n0,\n1,AA\n"):  # Kaggle does not mind the order
        path.write_text(f"id,label\n{rows}")
        check_sample_submission(tmp_path, 3)
    for rows, words in (
        ("0,AA\n1,AA\n", "2 rows, ids 0, 1 ...; expected 3, one for each frame of"),
        ("1,AA\n2,AA\n3,AA\n", "3 rows, ids 1, 2, 3 ...; expected 3"),
        ("", "0 rows"),
        ("0,AA\n1,AA\n1,AA\n", "ids 0, 1, 1 ..."),
        ("a,AA\nb,AA\nc,AA\n", "ids a, b, c ..."),
        ("0,AA,1\n", "1 rows, ids 0 ...; expected 3"),
    ):
        path.write_text(f"id,label\n{rows}")
        with pytest.raises(DataError) as caught:
            check_sample_submission(tmp_path, 3)
        assert str(caught.value).startswith(f"{path}: ") and words in str(caught.value)
    path.write_bytes(bytes(99))
    with pytest.raises(DataError, match="sample_submission.csv: "):
        check_sample_submission(tmp_path, 3)


def test_a_sample_submission_beside_the_data_is_compared_too(tmp_path, corpus):
    """As Kaggle mounts a competition."""
    (tmp_path / "data").mkdir()
    (tmp_path / "sample_submission.csv").write_text("Id,Label\n0,AA\n1,AA\n")
    check_sample_submission(tmp_path / "data", 2)
    with pytest.raises(DataError, match="sample_submission.csv: the sample submission has 2 rows"):
        check_sample_submission(tmp_path / "data", 3)
    (
        tmp_path / "data" / "answers.csv"
    ).touch()  # what lies beside a corpus made here is not its own
    check_sample_submission(tmp_path / "data", 3)


def test_a_folder_or_a_dead_link_is_no_sample_submission(tmp_path):
    (tmp_path / "a_sample_submission.csv").mkdir()
    (tmp_path / "sample_submission.csv").symlink_to(tmp_path / "nowhere")
    check_sample_submission(tmp_path, 3)


def test_a_csv_that_has_only_a_header_has_no_rows(tmp_path):
    (tmp_path / "a.csv").write_text("id,label\n")
    with pytest.raises(DataError, match="0 rows; expected 3"):
        read_submission(tmp_path / "a.csv", 3)


@pytest.mark.parametrize(
    "folder, configured, expected",
    [
        (
            "/kaggle/input/11785-hw-1-p-2-fall-2025-main/11785-f25-hw1p2",
            "",
            "11785-hw-1-p-2-fall-2025-main",
        ),
        ("/kaggle/input/competitions/an-edition-to-come/data", "", "an-edition-to-come"),
        ("/root/.cache/kagglehub/competitions/11785-hw1p2-f24/x", "", "11785-hw1p2-f24"),
        ("archive/11785-spring-2026-hw1p2", "", "hw-1-p-2-spring-2026-student-competition"),
        ("/kaggle/input/somebodys-copy/data", "", ""),
        ("runs/cache/practice-corpus", "", ""),
        ("/kaggle/input/competitions/11785-hw1p2-f24/x", "my-edition", "my-edition"),
    ],
)  # the user's word counts
def test_it_is_submitted_to_the_edition_that_the_data_are_from(folder, configured, expected):
    default = "11785-spring-25-hw-1-p-2"
    assert helpers.competition_of(helpers.Path(folder), configured or default) == (
        expected or default
    )


def run_on(mode, path="team/hw1p2/ab12cd34"):
    wandb_run = SimpleNamespace(settings=SimpleNamespace(mode=mode), path=path)
    return SimpleNamespace(wandb=wandb_run, config={"Name": "wide pencil"})


def test_the_message_names_the_wandb_run_where_it_is_online():
    assert helpers.submission_message(run_on("online")) == "HW1P2|WB=team/hw1p2/ab12cd34"
    for mode in ("offline", "disabled"):
        assert helpers.submission_message(run_on(mode)) == "wide pencil"


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_what_handing_in_takes(mode):
    hint = helpers.hand_in_hint(run_on(mode), "runs/x/submission.csv", "some-competition")
    assert "runs/x/submission.csv at kaggle.com/competitions/some-competition" in hint
    assert f"message {helpers.submission_message(run_on(mode))}\n" in hint
    assert ("upload it first" in hint) == (mode == "offline")


def test_the_default_edition_is_the_configs():
    assert definitions()["config"]["competition"] == next(iter(helpers.EDITIONS))


@pytest.mark.parametrize(
    "name",
    [
        "._sample_submission.csv",
        ".ipynb_checkpoints/a_sample_submission.csv",
        "~$sample_submission.csv",
        "__MACOSX/sample_submission.csv",
        "sample_submission.csv~",
        "archive~/sample_submission.csv",
    ],
)
def test_what_systems_and_editors_leave_is_no_sample_submission(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"\0\5\x16\7")
    check_sample_submission(tmp_path, 3)


@pytest.mark.parametrize(
    "error, raised",
    [
        (OSError(28, "No space left on device"), RunError),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (ValueError("x"), ValueError),
    ],
)
@pytest.mark.parametrize("step", ["content", "flush", "move"])
def test_a_failure_leaves_the_old_file(tmp_path, step, error, raised):
    path = tmp_path / "submission.csv"
    write(path, NAMES)
    before = path.read_bytes()

    def fail(*args, **kwargs):
        if step == "content":
            args[1].write_text("id,la")  # a part is there already
        raise error

    target, name = {
        "content": (pd.DataFrame, "to_csv"),
        "flush": (os, "fsync"),
        "move": (os, "replace"),
    }[step]
    with mock.patch.object(target, name, fail), pytest.raises(raised) as caught:
        write(path, NAMES[:3])
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["submission.csv"]
    if raised is RunError:
        assert str(path) in str(caught.value) and "unchanged" in str(caught.value)
    write(path, NAMES[:3])
    assert len(read_submission(path)) == 3


# ---- The kaggle command --------------------------------------------------------------------------


@pytest.fixture
def account(tmp_path, monkeypatch):
    """A folder with a home, a `bin` that is the whole PATH, and an environment without kaggle."""
    for name in ("KAGGLE_API_TOKEN", "KAGGLE_USERNAME", "KAGGLE_KEY", "KAGGLE_CONFIG_DIR"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "home").mkdir()
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    (tmp_path / "environment").mkdir()
    (tmp_path / "environment" / "python").symlink_to(PYTHON)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "environment" / "python"))
    monkeypatch.setattr(helpers.importlib.util, "find_spec", lambda name: None)
    return tmp_path


def fake(account, monkeypatch, code, folder="bin"):
    """Put a `kaggle` on the PATH that runs this Python code; with credentials."""
    command = account / folder / "kaggle"
    command.write_text(f"#!{PYTHON}\nimport sys\n{code}")
    command.chmod(0o755)
    monkeypatch.setenv("KAGGLE_API_TOKEN", "not-a-real-one")


posix = pytest.mark.skipif(os.name == "nt", reason="the fake command is a script with a shebang")


def test_without_the_command(account):
    with pytest.raises(RunError, match="pip install kaggle"):
        submit("a.csv", "a message", "11785-hw1p2-f24")


@posix
@pytest.mark.parametrize(
    "competition", ["11785-spring-25-hw-1-p-2", "hw-1-p-2-spring-2026-student-competition"]
)
def test_its_output_and_its_arguments(account, monkeypatch, competition):
    fake(account, monkeypatch, "print(sys.argv[1:])")
    arguments = ["competitions", "submit", "-c", competition, "-f", "a.csv", "-m", "two words"]
    assert submit(Path("a.csv"), "two words", competition) == str(arguments)


@posix
def test_the_command_of_an_environment_that_is_not_activated_comes_first(account, monkeypatch):
    fake(account, monkeypatch, "print('the environment')", "environment")
    assert submit("a.csv", "x", "11785-hw1p2-f24") == "the environment"
    fake(account, monkeypatch, "print('the PATH')")
    assert submit("a.csv", "x", "11785-hw1p2-f24") == "the environment"


@posix
def test_the_package_is_found_without_its_command(account, monkeypatch):
    (account / "kaggle").mkdir()  # a folder of that name is no package
    monkeypatch.setattr(helpers.importlib.util, "find_spec", FIND_SPEC)
    monkeypatch.syspath_prepend(str(account))
    monkeypatch.setenv("PYTHONPATH", str(account))
    if FIND_SPEC("kaggle").origin is None:  # else the package is installed here
        with pytest.raises(RunError, match="pip install kaggle"):
            submit("a.csv", "x", "11785-hw1p2-f24")
    (account / "kaggle" / "__init__.py").touch()
    (account / "kaggle" / "__main__.py").write_text("import sys; print('module', *sys.argv[1:3])")
    helpers.importlib.invalidate_caches()
    assert submit("a.csv", "x", "11785-hw1p2-f24") == "module competitions submit"


@posix
@pytest.mark.parametrize(
    "code",
    [
        "print('401 - Unauthorized'); sys.exit(1)",
        "print('403 - Forbidden'); sys.exit(1)",
        "sys.exit('403 Client Error: Forbidden for url: https://api.kaggle.com/v1/x')",
        "print('401 Client Error: Unauthorized')",
        "sys.exit('404 - Not Found')",
        "print('Could not submit to competition')",
    ],
)
def test_refused(account, monkeypatch, code):
    fake(account, monkeypatch, code)
    with pytest.raises(
        RunError, match="a.csv could not be submitted: .*(40[134]|Could not)"
    ) as caught:
        submit("a.csv", "a message", "11785-hw1p2-f24")
    message = str(caught.value)
    assert (
        "press Join on kaggle.com/competitions/11785-hw1p2-f24)" in message
        and "never into a cell" in message
    )
    assert "not-a-real-one" not in message


@posix
def test_of_a_long_output_the_end_is_reported(account, monkeypatch):
    fake(account, monkeypatch, "print('x' * 5000); sys.exit(2)")
    with pytest.raises(RunError, match="submitted: x{300}\n") as caught:
        submit("a.csv", "a message", "11785-hw1p2-f24")
    assert len(str(caught.value)) < 900
