"""Run the notebook in JupyterLab in a headless browser, as a student does, and take pictures of what is seen.

    python tests/benchmarks/browser.py --save runs/executed.ipynb --config '{"archetype": "pyramid", "num_layers": 2}'

Needs Chromium (Debian: apt-get install chromium) and `pip install playwright`; works on copies in a temporary folder.
Pictures: NNN-running.png every few seconds, end-cell-NN.png of each cell with output. Exit code 1: something is wrong.
"""

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parents[2]
NAME = "hw1p2_starter.ipynb"
CHROMIUM = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync"]
SETTINGS = {"notebook-extension/tracker": {"windowingMode": "none"},  # every cell is in the page, in view or not
            "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False}}
# Whenever the height of the training cell changes: time, number of figures, number of progress bars
WATCH = """index => {
    const cell = document.querySelectorAll('.jp-Notebook .jp-Cell')[index]
    const count = what => cell.querySelectorAll('.jp-OutputArea ' + what).length
    window.seen = []
    new ResizeObserver(() => seen.push([performance.now() / 1000, count('img'), count('.widget-hbox')])).observe(cell)
}"""
# What does not fit in the output of a cell, and what is left of progress bars
FLAWS = """cell => {
    const found = [...cell.querySelectorAll('.jp-OutputArea .widget-hbox')].map(() => 'has a progress bar left')
    for (const box of cell.querySelectorAll('.jp-Cell-outputArea, .jp-OutputArea-output, .jp-OutputArea-output pre')) {
        const lines = box.textContent.trimEnd().split('\\n').length, style = getComputedStyle(box)
        if (box.scrollHeight > box.clientHeight + 2 && style.overflowY != 'visible') found.push('scrolls')
        if (box.scrollWidth > box.clientWidth + 2) found.push('is too wide')
        if (box.matches('pre') && box.clientHeight > (lines + 0.5) * parseFloat(style.lineHeight)) found.push('wraps')
    }
    return found
}"""


def prepare(folder, changes):
    """Copy everything. Returns the indexes of the cell with the changes (the end if none) and of the training cell."""
    for name, values in SETTINGS.items():
        file = folder / f"settings/@jupyterlab/{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(values))
    (folder / "work").mkdir()
    shutil.copy(ROOT / "helpers.py", folder / "work")
    notebook = nbformat.read(ROOT / NAME, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.update(outputs=[], execution_count=None)  # those of an earlier run
    added = len(notebook.cells)
    if changes:
        added = 1 + next(i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", []))
        notebook.cells.insert(added, nbformat.v4.new_code_cell(f"config.update({changes!r})"))
    nbformat.write(notebook, folder / "work" / NAME)
    return added, next(i for i, cell in enumerate(notebook.cells) if "history = fit(" in cell.source)


def serve(folder):
    port, token = socket.create_server(("127.0.0.1", 0)).getsockname()[1], os.urandom(16).hex()
    environment = {key: os.environ[key] for key in os.environ if not key.startswith(("HW1P2", "JUPY", "MPL", "WANDB"))}
    environment |= {"HOME": str(folder), "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings")}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--IdentityProvider.token={token}",
               "--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}", "--LabApp.news_url=None"]
    server = subprocess.Popen(command, cwd=folder / "work", env=environment, stderr=subprocess.DEVNULL)
    while socket.socket().connect_ex(("127.0.0.1", port)) and server.poll() is None:
        time.sleep(0.5)
    return server, f"http://127.0.0.1:{port}/lab/tree/{NAME}?token={token}"


def run_all(page, training, added, options):
    """Run All Cells, with pictures meanwhile, then one of each output. Returns whether the training cell is good."""
    page.locator("text=/\\| Idle$/").wait_for(timeout=60000)
    page.evaluate(WATCH, training)
    page.locator(".lm-MenuBar-itemLabel:text-is('Run')").click()
    page.locator(".lm-Menu-itemLabel:text-is('Run All Cells')").click()
    start, pictures = time.monotonic(), 0
    running = page.locator(".jp-CodeCell:has(.jp-InputPrompt:text('*'))")
    running.first.wait_for()
    while running.count() and time.monotonic() < start + options.timeout:
        running.evaluate_all("cells => cells[0]?.scrollIntoView()")
        page.screenshot(path=options.out / f"{pictures:03d}-running.png")
        pictures += 1
        page.wait_for_timeout(1000 * options.every)
    print(f"{time.monotonic() - start:.0f} s" + (", NOT FINISHED" if running.count() else ""))
    page.set_viewport_size({"width": 1400, "height": 2400})  # so that a long cell fits into one picture
    for i, cell in enumerate(page.locator(".jp-Notebook .jp-Cell").all()):
        if cell.locator(".jp-OutputArea-output").count():
            number = i - (i > added)  # in the original notebook
            cell.screenshot(path=options.out / f"end-cell-{number:02d}.png")
            print(*(f"cell {number} {flaw}\n" for flaw in cell.evaluate(FLAWS)), sep="", end="")
    times, figures, bars = zip(*page.evaluate("seen.slice(seen.findIndex(state => state[1]))"))  # since the first
    gaps = [after - before for before, after, count in zip(times, times[1:], figures) if not count]
    print(f"training cell: at most {max(figures)} figures and {max(bars)} progress bars, {figures[-1]} and {bars[-1]} "
          f"in the end; {len(gaps)} times the figure was missing, for up to {max(gaps, default=0):.2f} s")
    return max(figures) == figures[-1] == 1 and bars[-1] == 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=json.loads, help="changes to the config, as JSON")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/browser", help="folder of the pictures")
    parser.add_argument("--save", type=Path, help="where to write the executed notebook")
    parser.add_argument("--every", type=float, default=3, help="seconds between pictures")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds for all cells")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for old in [*options.out.glob("*-running.png"), *options.out.glob("end-cell-*.png")]:
        old.unlink()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, sync_playwright() as playwright:
        added, training = prepare(Path(folder), options.config)
        server, url = serve(Path(folder))
        try:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=CHROMIUM)
            page, complaints = browser.new_page(viewport={"width": 1400, "height": 1000}), []
            page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
            page.on("pageerror", lambda error: complaints.append(str(error)))
            page.goto(url)
            good = run_all(page, training, added, options)
            page.keyboard.press("Control+s")
            page.locator(".lm-TabBar-tab:not(.jp-mod-dirty)", has_text=NAME).wait_for()
            browser.close()
        finally:
            server.terminate()  # and with it the kernel
            server.wait(60)
        notebook = nbformat.read(Path(folder) / "work" / NAME, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    outputs = [output for cell in cells for output in cell.outputs]
    errors = [f"{output.ename}: {output.evalue}" for output in outputs if output.output_type == "error"]
    in_order = [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    print(f"{sum(bool(cell.execution_count) for cell in cells)} of {len(cells)} code cells run, in order: {in_order}")
    warnings = [output.text for output in outputs if output.get("name") == "stderr"]
    print(f"{len(errors)} errors, {len(complaints)} console errors", *errors, *complaints, *warnings, sep="\n")
    if options.save:
        del notebook.cells[added:added + 1]
        notebook.metadata.pop("widgets", None)
        nbformat.write(notebook, options.save)
    return 0 if good and in_order and not errors else 1


if __name__ == "__main__":
    sys.exit(main())
