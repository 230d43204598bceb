"""Where the data come from: config["data"], each edition's folders, Kaggle's mounts, downloads."""

import contextlib
import importlib
import importlib.util
import io
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from support import kills
from support.notebook import Session, definitions

import helpers
from helpers import DataError, RunError

COMPETITION, INSTALL = definitions()["config"]["competition"], helpers.install


def get_data(choice, competition=COMPETITION):
    return helpers.get_data(choice, "cache", competition)


@pytest.fixture(autouse=True)
def nowhere(tmp_path, monkeypatch):
    """An empty working folder, no HW1P2_DATA, and not Kaggle's machine."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HW1P2_DATA", raising=False)
    monkeypatch.delenv("HW1P2_RUNS", raising=False)
    monkeypatch.setattr(helpers, "KAGGLE", tmp_path / "kaggle")
    monkeypatch.setattr(helpers, "install", lambda *packages: None)


@pytest.fixture
def made(monkeypatch):
    """What would be made, instead of making it."""
    calls = []
    monkeypatch.setattr(helpers, "install", lambda *packages: calls.append(packages))
    for name in ("practice", "librispeech"):
        monkeypatch.setattr(
            helpers,
            f"make_{name}_corpus",
            lambda root, name=name: calls.append(name) or root.mkdir(parents=True),
        )
    return calls


def partitions(folder):
    """Make the course's folders in this one, and give it back."""
    for name in helpers.PARTITIONS:
        (folder / name / "mfcc").mkdir(parents=True)
    return folder


EDITIONS = {
    "11785-hw1p2-f24": "",
    COMPETITION: "11785-s25-hw1p2",  # competition: folder of the data in it
    "11785-hw-1-p-2-fall-2025-main": "11785-f25-hw1p2",
    "hw-1-p-2-spring-2026-student-competition": "archive/11785-spring-2026-hw1p2",
}
each_edition = pytest.mark.parametrize("competition, inside", EDITIONS.items())


def test_auto_takes_the_environments_then_kaggles_then_the_practice_corpus(
    tmp_path, monkeypatch, made
):
    practice, beside = Path("cache/practice-corpus"), Path("11785-s25-hw1p2")
    for _ in range(2):  # made once, with what that needs
        assert get_data("auto") == practice and made == [("espeakng-loader",), "practice"]
    mounted = partitions(helpers.KAGGLE / "input" / COMPETITION / "11785-s25-hw1p2")
    assert get_data("auto") == mounted
    beside.symlink_to(mounted)
    assert get_data("auto") == beside  # the same folder, found twice
    monkeypatch.setenv("HW1P2_DATA", str(partitions(tmp_path / "elsewhere")))
    assert get_data("auto") == tmp_path / "elsewhere"
    assert get_data("kaggle") == beside  # a word in the config wins
    assert get_data("practice") == practice
    assert get_data("librispeech") == Path("cache/librispeech") and made[2:] == [
        ("datasets", "soundfile"),
        "librispeech",
    ]


# ---- The folder that holds train-clean-100/mfcc --------------------------------------------------


@each_edition
@pytest.mark.parametrize("mount", ["input", "input/competitions"])
def test_the_data_of_each_edition_are_found_in_both_mounts_of_kaggles(
    competition, inside, mount, capsys
):
    root = partitions(helpers.KAGGLE / mount / competition / inside)
    partitions(
        helpers.KAGGLE / "input" / "datasets" / "somebody" / "hw1p2"
    )  # attached as well, but not meant
    assert get_data("auto", competition) == get_data("kaggle", competition) == root
    assert not capsys.readouterr().out


@each_edition
@pytest.mark.parametrize("unpacked", [False, True])
def test_the_data_of_each_edition_are_found_beside_the_notebook(competition, inside, unpacked):
    root = partitions(Path(inside or competition) if unpacked else Path(competition, inside))
    assert get_data("auto") == get_data("kaggle") == root


@pytest.mark.parametrize("inside", [".", "a", "a/b/c/d", "archive/11785-spring-2026-hw1p2"])
def test_the_environments_folder_may_be_up_to_four_levels_too_high(tmp_path, monkeypatch, inside):
    root = partitions(tmp_path / "data" / inside)
    for name in (
        ".hidden",
        "__MACOSX",
        "x~",
        "corpus.partial",
    ):  # what is left in there is not taken
        partitions(tmp_path / "data" / name)
    monkeypatch.setenv("HW1P2_DATA", str(tmp_path / "data"))
    assert get_data("auto") == root


@pytest.mark.parametrize(
    "value", ["~/hw 1/data", "$PLACE/data", "${PLACE}/data/", ' "~/hw 1/data"\n', "'$PLACE/data'"]
)
def test_the_environments_path_is_read_as_a_shell_would(tmp_path, monkeypatch, value):
    partitions(tmp_path / "hw 1" / "data")
    for name, there in (
        ("HOME", tmp_path),
        ("USERPROFILE", tmp_path),
        ("PLACE", tmp_path / "hw 1"),
    ):
        monkeypatch.setenv(name, str(there))
    monkeypatch.setenv("HW1P2_DATA", value)
    assert get_data("auto") == tmp_path / "hw 1" / "data"


@pytest.mark.parametrize("value", ["", "  ", '""'])
def test_an_empty_variable_is_none(monkeypatch, made, value):
    monkeypatch.setenv("HW1P2_DATA", value)
    assert get_data("auto") == Path("cache/practice-corpus")


@pytest.mark.parametrize(
    "there, words",
    [
        ("data/a/b/c/d/e", "expected a folder, there or up to four levels below"),
        ("data/train-clean-100", "data: expected a folder"),
        ("elsewhere", "data: there is no such folder; expected"),
    ],
)
def test_a_folder_without_data_is_reported(tmp_path, monkeypatch, there, words):
    (tmp_path / there).mkdir(parents=True) if there.endswith("100") else partitions(
        tmp_path / there
    )
    monkeypatch.setenv("HW1P2_DATA", str(tmp_path / "data"))
    with pytest.raises(DataError) as caught:
        get_data("auto")
    assert str(caught.value).startswith(f"{tmp_path / 'data'}: ") and words in str(caught.value)


def test_of_several_folders_none_is_taken(tmp_path, monkeypatch):
    several = [partitions(Path(name)) for name in ("11785-f25-hw1p2", "11785-s25-hw1p2")]
    other = partitions(helpers.KAGGLE / "input" / "datasets" / "somebody" / "speech")
    for choice in ("auto", "kaggle"):
        with pytest.raises(
            DataError, match="f25.*s25.*: each of them holds.*Looked through: .*HW1P2_DATA"
        ) as caught:
            get_data(choice)
        assert str(other) in str(caught.value)  # looked through
    monkeypatch.setenv("HW1P2_DATA", ".")
    with pytest.raises(DataError, match="each of them holds train-clean-100/mfcc"):
        get_data("auto")
    monkeypatch.setenv("HW1P2_DATA", str(several[1]))
    assert get_data("auto") == several[1]


def test_what_is_hidden_too_deep_or_among_utterances_is_not_taken_nor_a_loop_followed(
    tmp_path, monkeypatch
):
    root = partitions(tmp_path / "data" / "a" / "b")
    for decoy in (".git/x", "a/c/d/e/f", "a/b/dev-clean/mfcc/x"):
        partitions(tmp_path / "data" / decoy)
    (tmp_path / "data" / "dev-clean" / "mfcc").mkdir(parents=True)  # an incomplete copy
    (tmp_path / "data" / "a" / "up").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "broken").symlink_to(tmp_path / "nowhere")
    monkeypatch.setenv("HW1P2_DATA", str(tmp_path / "data"))
    assert get_data("auto") == root


def test_own_corpora_of_another_copy_of_this_project_are_not_taken_for_the_courses(made, capsys):
    for name in ("practice-corpus", "librispeech"):
        (partitions(Path("hw1p2-runs/cache") / name) / "answers.csv").touch()
    partitions(Path("hw1p2-runs/cache/other.partial"))
    assert get_data("auto") == Path("cache/practice-corpus")
    assert (
        "no train-clean-100/mfcc in hw1p2-runs: taking the practice corpus\n"
        in capsys.readouterr().out
    )


# ---- Kaggle --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "11785-f25-hw1p2",
        "competitions/11785-hw-1-p-2-fall-2025-main/11785-f25-hw1p2",
        "datasets/somebody/speech/a/b/c/d",
        "notebooks/somebody/hw1/runs/cache/librispeech",
    ],
)
def test_what_is_attached_under_another_name_is_taken_and_reported(path, capsys):
    root = partitions(helpers.KAGGLE / "input" / path)
    (helpers.KAGGLE / "input" / "datasets" / "somebody" / "helpers").mkdir(parents=True)
    assert get_data("auto") == root
    assert (
        f"{root}: these data are attached, and taken in place of 11785-spring-25"
        in capsys.readouterr().out
    )


def test_where_something_else_is_attached_that_is_reported(made, capsys):
    attached = [
        helpers.KAGGLE / "input" / name
        for name in ("competitions/titanic", "datasets/somebody/images", "old")
    ]
    for folder in attached:
        folder.mkdir(parents=True)
    for _ in range(2):  # made, then there
        assert get_data("auto") == Path("cache/practice-corpus")
        words = (
            "taking the practice corpus. For the course's data, attach 11785-spring-25-hw-1-p-2 "
            "(Add Input)"
        )
        assert f"{', '.join(map(str, attached))}: {words}" in capsys.readouterr().out


def test_without_internet_kaggles_switch_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)  # it cannot be imported
    for folder in (None, helpers.KAGGLE):
        if folder:
            folder.mkdir()
        with pytest.raises(
            ImportError, match="practice corpus.*pip install espeakng-loader"
        ) as caught:
            get_data("practice")
        assert ("Settings > Internet" in str(caught.value)) == (folder is not None)
    fake_kagglehub(monkeypatch, lambda competition: 1 / 0)
    with pytest.raises(RunError, match="Settings > Internet"):
        get_data("kaggle")


def fake_kagglehub(monkeypatch, download):
    monkeypatch.setitem(sys.modules, "kagglehub", SimpleNamespace(competition_download=download))


@each_edition
def test_kaggle_downloads_what_is_not_there(tmp_path, monkeypatch, competition, inside):
    def download(name):
        assert name == competition
        partitions(tmp_path / "download" / inside)
        return str(tmp_path / "download")

    fake_kagglehub(monkeypatch, download)
    assert get_data("kaggle", competition) == tmp_path / "download" / inside


def test_a_download_of_something_else_is_reported(tmp_path, monkeypatch):
    (tmp_path / "download").mkdir()
    fake_kagglehub(monkeypatch, lambda competition: tmp_path / "download")
    with pytest.raises(
        DataError, match="download: expected a folder, there or up to four levels below"
    ):
        get_data("kaggle", "titanic")


@pytest.mark.parametrize(
    "error", [PermissionError("403 Forbidden"), ConnectionError("no route"), OSError(28, "full")]
)
def test_a_failed_download_says_what_to_do(monkeypatch, error):
    fake_kagglehub(monkeypatch, Mock(side_effect=error))
    words = (
        "(?s)could not be fetched.*press Join on kaggle.com/competitions/hw-1-p-2.*token.*"
        "9 GB.*run again"
    )
    with pytest.raises(RunError, match=words) as caught:
        get_data("kaggle", "hw-1-p-2-spring-2026-student-competition")
    assert type(error).__name__ in str(caught.value)


@pytest.fixture
def helpers_elsewhere(monkeypatch):
    """The notebook's functions, as in a new kernel with no helpers.py beside the notebook."""
    namespace = definitions()
    monkeypatch.setattr(
        sys, "path", [folder for folder in sys.path if not (Path(folder) / "helpers.py").exists()]
    )
    monkeypatch.delitem(sys.modules, "helpers")
    importlib.invalidate_caches()
    return namespace


@pytest.mark.parametrize(
    "place",
    ["input/helpers", "input/datasets/me/hw", "usr/lib/helpers", "usr/lib/notebooks/me/helpers"],
)
def test_helpers_is_found_where_kaggle_mounts_it(helpers_elsewhere, tmp_path, monkeypatch, place):
    folder = tmp_path / "mnt" / place
    for other in (folder, tmp_path / "mnt" / "input" / "another"):
        other.mkdir(parents=True)
        (other / "helpers.py").write_text("print()")
    (folder / "helpers.py").write_text("class AudioDataset: pass")
    helpers_elsewhere["Path"] = lambda path=".": Path(
        str(path).replace("/kaggle", f"{tmp_path}/mnt")
    )
    helpers_elsewhere["Path"].cwd = Path.cwd
    (tmp_path / "helpers").mkdir()  # a mere folder beside the notebook
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    helpers_elsewhere["find_helpers"]()
    assert importlib.util.find_spec("helpers").origin == str(folder / "helpers.py")


def test_where_there_is_no_helpers_the_message_says_where_it_belongs(helpers_elsewhere):
    with pytest.raises(FileNotFoundError, match="belongs beside this notebook.*Colab.*Kaggle"):
        helpers_elsewhere["find_helpers"]()


def test_a_folder_of_the_packages_name_does_not_hide_that_it_is_missing(tmp_path, monkeypatch):
    (tmp_path / "nopackage").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    asked = []
    monkeypatch.setattr(
        subprocess,
        "run",
        lambda command, **_: asked.append(command[-1]) or SimpleNamespace(returncode=0),
    )
    INSTALL("nopackage", "numpy")
    assert asked == ["nopackage"]


def test_what_is_installed_can_be_imported_where_a_folder_of_that_name_was_before(
    tmp_path, monkeypatch
):
    """wandb's own folder beside the notebook, `import wandb`, and only then its installation."""
    (tmp_path / "beside" / "latepackage").mkdir(parents=True)
    (tmp_path / "site").mkdir()
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.syspath_prepend(tmp_path / "beside")
    assert importlib.import_module("latepackage").__file__ is None

    def pip(command, **_):
        (tmp_path / "site" / "latepackage").mkdir()
        (tmp_path / "site" / "latepackage" / "__init__.py").write_text("x = 1")
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", pip)
    INSTALL("latepackage")
    assert importlib.import_module("latepackage").x == 1


def test_what_is_missing_is_installed_or_reported(monkeypatch):
    commands = []

    def pip(command, **_):
        commands.append(command)
        return SimpleNamespace(returncode=1, stderr="no such package")

    monkeypatch.setattr(subprocess, "run", pip)
    INSTALL("numpy", "torchsummaryX==1.1.0")
    assert not commands
    with pytest.raises(RunError, match="pip could not install no-such-module==2: no such package"):
        INSTALL("numpy", "no-such-module==2")
    assert commands == [[sys.executable, "-m", "pip", "install", "--quiet", "no-such-module==2"]]


def test_of_pips_long_message_whole_words_are_shown(monkeypatch):
    text = "WARNING: " + "Retrying " * 100 + "ERROR: No matching distribution"
    monkeypatch.setattr(
        subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1, stderr=text)
    )
    with pytest.raises(
        RunError, match="no-such-module: (Retrying )+ERROR: No matching distribution\nIs there"
    ):
        INSTALL("no-such-module")


def test_a_folder_that_cannot_be_written_to_is_reported_before_anything_is_loaded(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="file/runs cannot be written to.*HW1P2_RUNS"):
        Session(tmp_path / "file" / "runs").run_all(until="def load_data")
    session = Session(tmp_path / "runs")
    session.run_all(until="def load_data")
    assert (tmp_path / "runs").is_dir()


def make_slowly(root):
    partial = root.with_name("partial")
    partial.mkdir(parents=True)
    with open("making", "a") as file:
        file.write("x")
    time.sleep(0.5)
    partial.rename(root)


def start_of_a_notebook(report, folder):
    os.chdir(folder)
    helpers.make_practice_corpus = make_slowly
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        data_folder = helpers.get_data("practice", "cache", "")
    report.send((data_folder, printed.getvalue()))


@pytest.mark.slow
def test_of_two_notebooks_that_start_together_the_second_waits(tmp_path):
    children = [kills.start_reporting(start_of_a_notebook, tmp_path) for _ in range(2)]
    results = [received.recv() for _, received in children]
    for child, _ in children:
        child.join()
    assert (tmp_path / "making").read_text() == "x"  # one of them made it
    assert [folder for folder, _ in results] == 2 * [Path("cache/practice-corpus")]
    assert sum("waiting for it" in printed for _, printed in results) <= 1
