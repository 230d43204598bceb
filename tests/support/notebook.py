"""The notebook's own code for the tests: its cells in a namespace, or all of it in a kernel."""

import ast
import contextlib
import functools
import itertools
import json
import linecache
import os
import re
import sys
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "hw1p2_starter.ipynb"
# texts by which its cells are found
TRAINING = "run = make_run(config)\n"
RESULTS = "results = evaluate_best(run)"
SUBMISSION = "predictions = test(run, "
LAST = "helpers.finish_wandb(run, results, submission)"
CELLS = itertools.count()  # that were executed


@functools.cache
def notebook_cells():
    """The cells of the notebook, as its file has them; not to be changed."""
    return json.loads(NOTEBOOK.read_text("utf-8"))["cells"]


def code_cells(changes=None):
    """The sources of the code cells.

    With changes, a cell `config.update(changes)` follows the one that is tagged `parameters`.
    """
    sources = []
    for cell in notebook_cells():
        if cell["cell_type"] == "code":
            sources.append("".join(cell["source"]))
            if "parameters" in cell["metadata"].get("tags", []) and changes:
                sources.append(f"config.update({changes!r})")
    return sources


def python_blocks(text):
    """The Python code in the fences of a Markdown text."""
    return re.findall(r"```python\n(.*?)```", text, re.S)


def notebook_text():
    """All texts of the notebook."""
    cells = [cell for cell in notebook_cells() if cell["cell_type"] == "markdown"]
    return "\n".join("".join(cell["source"]) for cell in cells)


def run_cells(changes=None, until=None, runs="runs", data=None, before_cell=None):
    """Execute the code cells up to the one that contains `until`. Returns the namespace.

    before_cell: called with the source of each cell before it is executed.
    """
    session = Session(runs, data, changes)
    session.run_all(until, before_cell)
    return session.namespace


class Session:
    """The notebook's code cells in one namespace of this process.

    They may be run in any order, edited, interrupted, and run again.

    Example:
        session = Session(tmp_path, corpus, TINY)
        session.run_all()
        session["config"]["epochs"] = 3
        session.run("history = fit(run)")  # the cell that contains this
    """

    def __init__(self, runs, data=None, changes=None, wandb_mode="disabled"):
        self.changes, self.namespace = changes, {"__name__": "notebook"}
        self.environment = {
            "HW1P2_RUNS": str(runs),
            "MPLBACKEND": "Agg",
            "TQDM_DISABLE": "1",
            "WANDB_MODE": wandb_mode,
            "WANDB_SILENT": "true",
        }
        self.environment |= {"HW1P2_DATA": str(data)} if data else {}

    def __getitem__(self, name):
        return self.namespace[name]

    @contextlib.contextmanager
    def _surroundings(self):
        with (
            mock.patch.dict(os.environ, self.environment),
            mock.patch.object(sys, "path", [str(ROOT), *sys.path]),
        ):
            yield

    def execute(self, *sources, before_cell=None):
        """Execute sources of cells; `before_cell` is called with each one before."""
        with self._surroundings():
            for source in sources:
                if before_cell is not None:
                    before_cell(source)
                # as in Jupyter, the source of what is defined can be had by the cell's name
                name = f"<cell {next(CELLS)}>"
                linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
                exec(compile(source, name, "exec"), self.namespace)
                if "plt" in self.namespace:  # Jupyter closes a cell's figures, too
                    self.namespace["plt"].close("all")

    def call(self, name, *arguments):
        """Call a function of the notebook."""
        with self._surroundings():
            return self.namespace[name](*arguments)

    def run_all(self, until=None, before_cell=None):
        """All cells up to the one that contains `until`, with the changes to the config."""
        cells = code_cells(self.changes)
        stop = (
            len(cells)
            if until is None
            else next(i for i, source in enumerate(cells) if until in source)
        )
        self.execute(*cells[:stop], before_cell=before_cell)

    def run(self, *texts):
        """The cells that contain these texts, in this order; without the changes to the config."""
        for text in texts:
            [source] = [source for source in code_cells() if text in source]
            self.execute(source)


@functools.cache
def _compiled_definitions():
    """[(code, whether it is an import), ...] of what `definitions` executes."""
    wanted = {
        "device",
        "device_name",
        "data_device",
        "config",
        "ARCHETYPES",
        "ACTIVATIONS",
        "INITIALIZATIONS",
        "NETWORKS",
        "LOSSES",
        "OPTIMIZERS",
        "SCHEDULERS",
        "AUGMENTATIONS",
        "PENCIL_DROPOUT",
        "PARTS",
        "MADE_IN",
    }

    def sets(node):
        targets = {
            name.id
            for name in ast.walk(node)
            if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)
        }
        return isinstance(node, (ast.Assign, ast.If)) and bool(targets & wanted)

    compiled = []
    for source in code_cells():
        for node in ast.parse(source).body:
            imports = isinstance(node, (ast.Import, ast.ImportFrom))
            if imports or isinstance(node, (ast.FunctionDef, ast.ClassDef)) or sets(node):
                code = compile(ast.Module([node], []), "<notebook>", "exec")
                compiled.append((code, imports))
    return compiled


def definitions():
    """A namespace with the notebook's imports, config, tables, functions and classes.

    Nothing else is run. What is not installed is left out.
    """
    namespace = {"__name__": "notebook"}
    with (
        mock.patch.dict(os.environ, {"MPLBACKEND": "Agg"}),
        mock.patch.object(sys, "path", [str(ROOT), *sys.path]),
    ):
        for code, imports in _compiled_definitions():
            with contextlib.suppress(ImportError if imports else ()):
                exec(code, namespace)
    return namespace


def execute(changes, runs):
    """Execute the notebook in a kernel of its own, as `jupyter nbconvert --execute` does."""
    import nbformat  # here, as the benchmarks also run on machines without these two
    from nbclient import NotebookClient

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    index = next(
        i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", [])
    )
    notebook.cells.insert(index + 1, nbformat.v4.new_code_cell(f"config.update({changes!r})"))
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith(("WANDB", "HW1P2"))
    }
    environment |= {"HW1P2_RUNS": str(runs), "HOME": str(runs)}
    client = NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}
    )
    return client.execute(env=environment)
