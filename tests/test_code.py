"""A run belongs to the code that made it: which edits are noticed, and which are none."""

import functools
import inspect
import itertools
import linecache
import re
import textwrap

import pytest
import torch
from support import configs
from support.notebook import LAST, RESULTS, Session, code_cells
from support.reference import packed_equal, write_partition

import helpers
from helpers import RunError, code_differences, code_of, code_of_network

QUICK = {**configs.QUICK, "epochs": 1}
NUMBERS = itertools.count()


def define(source, **known):
    """The names that a source defines; the source can be had, as in a notebook."""
    name = f"<test {next(NUMBERS)}>"
    source = textwrap.dedent(source)
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    known |= {"__name__": "notebook", "torch": torch, "functools": functools}
    exec(compile(source, name, "exec"), known)
    return known


SOURCE = '''
    RATE = 0.5


    def twice(x):
        """Twice as much."""
        return RATE * x


    def train(x):
        # the loop
        for _ in range(3):
            x = twice(x)
        return torch.relu(x)


    class Layer(torch.nn.Module):
        def forward(self, x):
            return twice(x)


    def make(power):
        return lambda x: x ** power


    TABLE = {"a": make(2), "b": functools.partial(torch.optim.SGD, momentum=0.9, fused=True)}
'''


def described(old=None, new=None):
    names = define(SOURCE if old is None else SOURCE.replace(old, new))
    assert old is None or old in SOURCE
    parts = {name: names[name] for name in ("train", "Layer")} | {
        f"TABLE[{key}]": names["TABLE"][key] for key in "ab"
    }
    return code_of(parts)


@pytest.mark.parametrize(
    "old, new, named",
    [
        ("range(3)", "range(4)", "`train` has changed"),
        ("RATE * x", "RATE + x", "`twice` has changed"),
        ("RATE = 0.5", "RATE = 0.25", "RATE: 0.5 there, 0.25 now"),
        ("return twice", "return 1 + twice", "`Layer.forward`"),
        ("x ** power", "x + power", r"TABLE\[a\]"),
        ("make(2)", "make(3)", r"TABLE\[a\], power: 2 there, 3 now"),
        (
            "momentum=0.9",
            "momentum=0.8",
            r"TABLE\[b\], given: momentum=0.9 there, momentum=0.8 now",
        ),
        ("optim.SGD", "optim.Adam", r"TABLE\[b\]: torch.optim.sgd.SGD there"),
        ("    x = twice(x)\n    ", "    x = x\n        x = twice(x)\n    ", "`train`"),
    ],
    ids=str,
)
def test_an_edit_is_named(old, new, named):
    [first, *_] = differences = code_differences(described(), described(old, new))
    assert re.search(named, first), differences


@pytest.mark.parametrize(
    "old, new",
    [
        ("# the loop", "# another comment"),
        ("Twice as much.", "Two times."),
        ("range(3)", "range( 3 )"),
        ("x = twice(x)", "x = (twice(\n                x))"),
        ("fused=True", "fused=False"),
        ("\n    def make", "\n    def unused():\n        pass\n\n\n    def make"),
        ("return torch.relu(x)", "return torch.compile(torch.relu)(x)"),
        pytest.param("def twice", "@torch.compile\n    def twice", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_what_changes_no_number_is_no_difference(old, new):
    assert code_differences(described(), described(old, new)) == []


def test_a_difference_shows_the_lines():
    lines = code_differences(described(), described("range(3)", "range(4)"))
    assert lines == [
        "`train` has changed; - there, + now:",
        "  -    for _ in range(3):",
        "  +    for _ in range(4):",
    ]


def test_what_refers_to_itself_is_described_once():
    names = define("""
        def make():
            count = lambda n: n and count(n - 1)
            return count


        class Loss:
            def __init__(self):
                self.again = self.loss

            def loss(self, logits, phonemes):
                return helper(logits)


        def helper(x):
            return 1 if x is None else helper(None)


        TABLE = {}
        TABLE["itself"] = TABLE
    """)
    code = code_of(
        {"count": names["make"](), "loss": names["Loss"]().loss, "table": names["TABLE"]}
    )
    assert "count(n - 1)" in code["count"] and "helper(None)" in code["helper"]
    assert "return helper" in code["Loss.loss"] and code["table"] == "dict"


def test_an_edit_of_helpers_after_the_import_is_said_and_is_not_what_runs(monkeypatch, tmp_path):
    assert helpers.edited_hint() == ""
    before = code_of({"mask": helpers.mask_frames})
    monkeypatch.setattr(helpers, "_read_source", lambda: "def mask_frames(): pass")
    assert "restart the kernel" in helpers.edited_hint()
    assert (
        code_of({"mask": helpers.mask_frames}) == before
        and "def mask_frames(frames" in before["mask_frames"]
    )
    monkeypatch.setattr(helpers, "_read_source", lambda: None)  # the file is not there
    assert helpers.edited_hint() == ""


def test_where_there_is_no_source_there_is_no_difference():
    names = {"__name__": "notebook"}
    exec("def train(x):\n    return x + 1", names)
    assert inspect.isfunction(names["train"]) and code_of({"train": names["train"]}) == {}
    assert code_differences({}, described()) == code_differences(described(), {}) == []


def test_a_loss_is_known_by_what_it_holds():
    def loss(**options):
        return code_of({"loss": torch.nn.CrossEntropyLoss(**options)})

    assert code_differences(loss(label_smoothing=0.1), loss(label_smoothing=0.2)) == [
        "loss.label_smoothing: 0.1 there, 0.2 now"
    ]
    [line] = code_differences(
        loss(weight=torch.ones(3)), loss(weight=torch.tensor([1.0, 2.0, 1.0]))
    )
    assert "loss.weight: " in line and "1 1 1 there" in line and "1 2 1 now" in line
    assert code_differences(loss(weight=torch.ones(3)), loss(weight=torch.ones(3))) == []


@pytest.mark.slow
def test_a_network_is_known_by_its_layers_compiled_or_not():
    def network(slope=0.01, bias=True):
        return torch.nn.Sequential(torch.nn.Linear(3, 2, bias=bias), torch.nn.LeakyReLU(slope))

    plain = code_of_network(network())
    assert code_differences(plain, code_of_network(network(slope=0.1))) == [
        "layer 1, negative_slope: 0.01 there, 0.1 now"
    ]
    part = network()
    part[0] = torch.compile(part[0])
    assert code_of_network(torch.compile(network())) == code_of_network(part) == plain
    fewer = {
        name: text for name, text in plain.items() if name != "layer 0, bias"
    }  # an older torch prints no bias
    assert code_differences(fewer, plain) == []


# ---- In the notebook -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    """A runs folder with a finished run."""
    runs = tmp_path_factory.mktemp("trained")
    Session(runs, corpus, QUICK).run_all(until=RESULTS)
    return runs


def again(runs, corpus, *edits, **changes):
    """The notebook's cells again, as far as to the CSV.

    edits: (old, new), each for the one cell that contains `old`.
    """
    session = Session(runs, corpus, {**QUICK, **changes})
    cells = code_cells(session.changes)
    for old, new in edits:
        [index] = [i for i, source in enumerate(cells) if source.count(old) == 1]
        cells[index] = cells[index].replace(old, new)
    [end] = [i for i, source in enumerate(cells) if LAST in source]
    session.execute(*cells[:end])
    return session


@pytest.mark.slow
@pytest.mark.parametrize(
    "old, new, named",
    [
        ("torch.rand(()) < 0.7", "torch.rand(()) < 0.5", "`train` has changed"),
        (
            "layers.append(nn.LeakyReLU())",
            "layers.append(nn.LeakyReLU(0.5))",
            "`Network.__init__` has changed",
        ),
        (
            "self.model(frames.flatten(1).float())",
            "2 * self.model(frames.flatten(1).float())",
            "`Network.forward`",
        ),
        (
            '"crossentropy": lambda data: nn.CrossEntropyLoss()',
            '"crossentropy": lambda data: nn.CrossEntropyLoss(label_smoothing=0.2)',
            "label_smoothing: 0.0 there, 0.2",
        ),
        (
            "partial(optim.AdamW, ",
            "partial(optim.AdamW, betas=(0.8, 0.9), ",
            "given: nothing there, betas=(0.8, 0.9) now",
        ),
        ("T_max=epochs)", "T_max=2 * epochs)", "SCHEDULERS"),
        (
            "2 * (1600 / max(widths))",
            "3 * (1600 / max(widths))",
            "`learning_rate_scale` has changed",
        ),
        ("(1.8 * parameters / frames)", "(1.9 * parameters / frames)", "`dropout_factor` has"),
    ],
    ids=lambda text: text[:30],
)
def test_a_run_of_other_code_is_refused_and_the_difference_named(trained, corpus, old, new, named):
    before = (trained / "pencil" / "checkpoint.pt").read_bytes()
    with pytest.raises(RunError) as error:
        again(trained, corpus, (old, new))
    assert (
        named in str(error.value)
        and "Undo the edit" in str(error.value)
        and "'Name'" in str(error.value)
    )
    assert (trained / "pencil" / "checkpoint.pt").read_bytes() == before


@pytest.mark.slow
def test_a_finished_run_opens_after_edits_that_make_no_weights(trained, corpus):
    session = again(
        trained,
        corpus,
        ('    """One epoch.', '    """An epoch.'),
        ("tqdm(loader,", "tqdm(loader,  # a bar\n                               "),
        (
            "helpers.plot_phonemes(results.by_phoneme",
            "helpers.plot_phonemes(results.by_phoneme[:9]",
        ),
        ("Mean loss and accuracy (0-1) over all frames.", "Loss and accuracy."),
        (
            '"exponential": Schedule(',
            '"another": Schedule(lambda *_: None), "exponential": Schedule(',
        ),
        ("lr {row['learning_rate']:.7f}", "rate {row['learning_rate']:.7f}"),
    )
    assert len(session["history"]) == 1 and (trained / "pencil" / "submission.csv").exists()


@pytest.mark.slow
def test_fit_alone_notices_an_edit_too(trained, corpus):
    session = again(trained, corpus)
    [source] = [source for source in code_cells() if "def train(" in source]
    session.execute(source.replace("< 0.7", "< 0.5"))
    with pytest.raises(RunError, match="`train` has changed"):
        session.call("fit", session["run"])


def edited(monkeypatch, name, old, new):
    """Put an edited function in the place of a function of helpers."""
    source = inspect.getsource(getattr(helpers, name))
    assert old in source
    file = f"<helpers {next(NUMBERS)}>"
    source = source.replace(old, new)
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    names = {}
    exec(compile(source, file, "exec"), vars(helpers), names)
    monkeypatch.setattr(helpers, name, names[name])


def test_an_edit_of_the_features_makes_the_cache_anew_and_is_another_run(
    trained, corpus, monkeypatch, tmp_path
):
    write_partition(tmp_path / "data", "dev-clean", [20, 5], 1)
    old = helpers.read_partition(tmp_path / "data", "dev-clean", cache=tmp_path / "cache")
    edited(monkeypatch, "_mfccs", "return array, first", "return array.clip(-1, 1), first")
    times = []
    plain = helpers.read_partition(tmp_path / "data", "dev-clean")
    for _ in range(2):
        new = helpers.read_partition(tmp_path / "data", "dev-clean", cache=tmp_path / "cache")
        assert packed_equal(new, plain) and not packed_equal(new, old)
        [path] = (tmp_path / "cache").glob("*.safetensors")  # in the place of the old one
        times.append(path.stat().st_mtime_ns)
    assert times[0] == times[1]


@pytest.mark.slow
def test_a_run_on_features_of_other_code_is_refused(trained, corpus, monkeypatch):
    edited(monkeypatch, "_mfccs", "return array, first", "return array.clip(-1, 1), first")
    with pytest.raises(RunError, match="`_mfccs` has changed"):
        again(trained, corpus)


def test_comments_make_no_cache_anew(monkeypatch, tmp_path):
    write_partition(tmp_path / "data", "dev-clean", [20, 5], 1)
    helpers.read_partition(tmp_path / "data", "dev-clean", cache=tmp_path)
    edited(monkeypatch, "_mfccs", "    with np.errstate", "    # a comment\n    with np.errstate")
    [path] = tmp_path.glob("*.safetensors")
    before = path.stat().st_mtime_ns
    helpers.read_partition(tmp_path / "data", "dev-clean", cache=tmp_path)
    assert path.stat().st_mtime_ns == before


def test_a_helper_that_train_uses_is_part_of_the_run(trained, corpus, monkeypatch):
    edited(monkeypatch, "_draw_masks", "(min(longest, length) + 1)", "(min(longest, length) + 0)")
    with pytest.raises(RunError, match="`_draw_masks` has changed"):
        again(trained, corpus)


# ---- Keys of the config --------------------------------------------------------------------------


@pytest.mark.slow
def test_a_refusal_names_the_switch_that_set_the_key(trained, corpus):
    with pytest.raises(RunError) as error:
        again(trained, corpus, recipe="original")
    assert "warp: 0.2 there, 0 now (config['recipe'] = 'original' may have set it)" in str(
        error.value
    )


def test_what_shorten_has_set_is_named(tmp_path):
    saved = {"epochs": 3, "batch_size": 512, "shorten": True, "recipe": "best", "dropout_scale": 1}
    now = {**saved, "epochs": 150, "batch_size": 2048, "shorten": False}
    helpers.save_checkpoint(tmp_path / "checkpoint.pt", {"config": saved, "history": []})
    with pytest.raises(RunError) as error:
        helpers.load_checkpoint(tmp_path / "checkpoint.pt", now)
    assert "epochs: 3 there (config['shorten'] = True may have set it), 150 now\n" in str(
        error.value
    )
    assert "batch_size: 512 there (config['shorten'] = True may have set it), 2048 now\n" in str(
        error.value
    )


@pytest.mark.slow
def test_a_key_that_the_run_did_not_know_has_its_off_value(trained, corpus, tmp_path):
    path = tmp_path / "runs" / "pencil" / "checkpoint.pt"
    state = helpers.load_checkpoint(trained / "pencil" / "checkpoint.pt")
    for key in ("seed", "loss", "start_from"):
        del state["config"][key]
    helpers.save_checkpoint(path, state)
    helpers.save_checkpoint(
        path.with_name("best.pt"), helpers.load_checkpoint(trained / "pencil" / "best.pt")
    )
    assert len(again(tmp_path / "runs", corpus)["history"]) == 1
    with pytest.raises(RunError, match=r"seed: 23 there, 24 now \(a key that was added since\)"):
        again(tmp_path / "runs", corpus, seed=24)
    config = {**state["config"], "seed": 23, "loss": "crossentropy", "noise": 0}
    for off in (0, False, None):
        helpers.load_checkpoint(path, {**config, "noise": off})
    with pytest.raises(RunError, match="noise: None there, 0.5 now"):
        helpers.load_checkpoint(path, {**config, "noise": 0.5})
    with pytest.raises(RunError, match="dropout: 0.225 there, None now"):  # a key that is gone
        helpers.load_checkpoint(
            path, {key: value for key, value in state["config"].items() if key != "dropout"}
        )
