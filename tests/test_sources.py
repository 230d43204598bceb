"""Where the data come from: config["data"], Kaggle's folders and download, two notebooks that start together."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from notebook import ROOT, definitions

import helpers
from helpers import RunError, get_data


@pytest.fixture(autouse=True)
def nowhere(tmp_path, monkeypatch):
    """An empty working folder, no HW1P2_DATA, and not Kaggle's machine."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HW1P2_DATA", raising=False)
    monkeypatch.delenv("HW1P2_RUNS", raising=False)
    monkeypatch.setattr(helpers, "KAGGLE", tmp_path / "kaggle")


@pytest.fixture
def made(monkeypatch):
    """What would be made, instead of making it."""
    calls = []
    for name in ("practice", "librispeech"):
        monkeypatch.setattr(helpers, f"make_{name}_corpus",
                            lambda root, name=name: calls.append(name) or root.mkdir(parents=True))
    return calls


def partitions(folder):
    for name in helpers.PARTITIONS:
        (folder / name / "mfcc").mkdir(parents=True)


def test_auto_takes_the_environments_then_kaggles_then_the_practice_corpus(tmp_path, monkeypatch, made):
    assert get_data("auto", "cache") == Path("cache/practice-corpus") and made == ["practice"]
    assert get_data("auto", "cache") == Path("cache/practice-corpus") and made == ["practice"]  # once
    partitions(helpers.KAGGLE / "input" / helpers.COMPETITION / helpers.KAGGLE_FOLDER)
    assert get_data("auto", "cache") == helpers.KAGGLE / "input" / helpers.COMPETITION / helpers.KAGGLE_FOLDER
    partitions(Path(helpers.KAGGLE_FOLDER))
    assert get_data("auto", "cache") == Path(helpers.KAGGLE_FOLDER)
    monkeypatch.setenv("HW1P2_DATA", "elsewhere")
    assert get_data("auto", "cache") == Path("elsewhere")
    assert get_data("kaggle", "cache") == Path(helpers.KAGGLE_FOLDER)  # a word in the config wins
    assert get_data("practice", "cache") == Path("cache/practice-corpus")
    assert get_data("librispeech", "cache") == Path("cache/librispeech") and made == ["practice", "librispeech"]


def fake_kagglehub(monkeypatch, download):
    monkeypatch.setitem(sys.modules, "kagglehub", SimpleNamespace(competition_download=download))


@pytest.mark.parametrize("inside", ["", helpers.KAGGLE_FOLDER])
def test_kaggle_downloads_what_is_not_there(tmp_path, monkeypatch, inside):
    def download(competition):
        assert competition == helpers.COMPETITION
        partitions(tmp_path / "download" / inside)
        return str(tmp_path / "download")
    fake_kagglehub(monkeypatch, download)
    assert get_data("kaggle", "cache") == tmp_path / "download" / inside


@pytest.mark.parametrize("error", [PermissionError("403 Forbidden"), ConnectionError("no route"), OSError(28, "full")])
def test_a_failed_download_says_what_to_do(monkeypatch, error):
    def download(competition):
        raise error
    fake_kagglehub(monkeypatch, download)
    with pytest.raises(RunError, match="(?s)could not be fetched.*press Join on.*token.*9 GB.*run again") as caught:
        get_data("kaggle", "cache")
    assert type(error).__name__ in str(caught.value)


def test_what_is_missing_is_installed_or_told(monkeypatch):
    install, commands = definitions()["install"], []

    def pip(command, **_):
        commands.append(command)
        return SimpleNamespace(returncode=1, stderr="no such package")
    monkeypatch.setattr(subprocess, "run", pip)
    install("numpy", "torchsummaryX==1.1.0")
    assert not commands
    with pytest.raises(RuntimeError, match="pip could not install no-such-module==2: no such package"):
        install("numpy", "no-such-module==2")
    assert commands == [[sys.executable, "-m", "pip", "install", "--quiet", "no-such-module==2"]]


def test_runs_are_kept_where_kaggle_keeps_them(monkeypatch):
    runs_folder = definitions()["runs_folder"]
    assert runs_folder() == Path("runs")
    (helpers.KAGGLE / "working").mkdir(parents=True)
    assert runs_folder() == helpers.KAGGLE / "working" / "runs"
    monkeypatch.setenv("HW1P2_RUNS", "elsewhere")
    assert runs_folder(drive=True) == Path("elsewhere")  # drive is for Colab


TWO = """
import time, helpers
def make(root):
    partial = root.with_name("partial")
    partial.mkdir(parents=True)
    open("making", "a").write("x")
    time.sleep(2)
    partial.rename(root)
helpers.make_practice_corpus = make
print(helpers.get_data("practice", "cache"))
"""


def test_of_two_notebooks_that_start_together_the_second_waits(tmp_path):
    first, second = [subprocess.Popen([sys.executable, "-c", TWO], cwd=tmp_path, stdout=subprocess.PIPE, text=True,
                                      stderr=subprocess.PIPE, env={**helpers.os.environ, "PYTHONPATH": str(ROOT)})
                     for _ in range(2)]
    results = [process.communicate(timeout=120) for process in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0], results
    assert (tmp_path / "making").read_text() == "x"  # one of them made it
    assert sum("waiting for it" in output for output, _ in results) <= 1
    assert all(output.endswith("practice-corpus\n") for output, _ in results)
