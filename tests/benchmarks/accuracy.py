"""How many more frames does each change to the training get right?

Recipes are compared side by side; the notebook's own functions train them.

    python tests/benchmarks/accuracy.py DATA
    python tests/benchmarks/accuracy.py DATA --epochs 3 10 --seeds 23 24 25 \\
        --recipes original warp=0.2 best
    python tests/benchmarks/accuracy.py DATA --width 128 --match-noise --epochs 3 12

DATA is a folder in the course's layout. Without options: the original's recipe and ours, three
epochs, one seed. A recipe is "best" (the notebook's config as it stands), "original" (the same
with `recipe` "original"), or changes to the original's: key=value,key=value. What is trained is
kept in --folder and not trained again; if the program is killed, the next call resumes at that
epoch. `subset` is of the training data; the validation set stays
whole. Viterbi's weights are chosen on each half of the utterances for the other half.

--width narrows the pencil, so that a small set has as many frames per parameter as the course's
has for the whole network (1.8). The same dropout is more noise in a narrow layer: --match-noise
lowers every rate p to the one with p / (1 - p) in proportion to the width, which is the same noise
in a sum over the layer's units as at 1600; a `dropout_scale` of "auto" does so on its
own. accuracy.md keeps what was found.
"""

import argparse
import ast
import hashlib
import json
import os
import re
from pathlib import Path

import common
import matplotlib.pyplot as plt
import numpy as np
import torch
from support import notebook

import helpers

NOTEBOOK = notebook.definitions()
LOAD_DATA = NOTEBOOK["load_data"]
WIDTH = 1600
NOTEBOOK["show_progress"] = lambda run, history, *_: (
    history and print(NOTEBOOK["describe"](history[-1], run.config["epochs"]), flush=True)
)
NOTEBOOK["load_data"] = lambda config, folder: (
    LOAD_DATA(config, folder)[0],
    *LOAD_DATA({**config, "subset": 1}, folder)[1:],
)


def config_of(recipe, epochs):
    """The config that a recipe's name stands for."""
    config = {**NOTEBOOK["config"], "epochs": epochs, "shorten": False, "wandb": "disabled"}
    if recipe != "best":
        config |= helpers.ORIGINAL
    if "=" in recipe:
        for change in recipe.removeprefix("original,").split(","):
            key, value = change.split("=")
            try:
                config[key] = ast.literal_eval(value)
            except (ValueError, SyntaxError):
                config[key] = value
    return helpers.check_config(config, NOTEBOOK["options"]())


def narrow(width, match_noise):
    """Make the notebook's pencil `width` units wide; match_noise: adapt its dropout rates."""
    set_dropout = NOTEBOOK["set_dropout"]

    def matched(model, config, *arguments):
        scale = set_dropout(model, config, *arguments)
        if config["dropout_scale"] != "auto":  # which is in proportion to the width on its own
            for layer in (layer for layer in model.model if isinstance(layer, torch.nn.Dropout)):
                odds = layer.p / (1 - layer.p) * width / WIDTH
                layer.p = odds / (1 + odds)
        return scale

    NOTEBOOK["ARCHETYPES"]["pencil"] = lambda n: [width] * 7
    if match_noise:
        NOTEBOOK["set_dropout"] = matched


def train(config, seed, arguments):
    """Train, unless it was trained before. Returns what is kept of a run.

    alone, mean, viterbi: whether each validation frame is right, bool (n,), by the network alone,
    by the mean over warps, and by Viterbi. Then the columns of the history, and
    frames_a_parameter: training frames per parameter of the network.
    """
    changes = [
        f"{key}={config[key]}"
        for key in config
        if key not in (*helpers.KEYS_FREE_ON_RESUME, "seed")
        and (key == "epochs" or config[key] != {**NOTEBOOK["config"], **helpers.ORIGINAL}[key])
    ]
    network = []
    if arguments.width != WIDTH:
        network.append(f"width={arguments.width}")
    if arguments.match_noise:
        network.append("match-noise")
    name = "-".join([arguments.data.name, *network, *changes, f"seed={seed}"])
    if len(name) >= 200:
        name = f"{name[:150]}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"
    path = arguments.folder / name / "right.npz"
    if not path.exists():
        print(f"# {name}", flush=True)
        run = NOTEBOOK["make_run"]({**config, "Name": name, "seed": seed})
        history = NOTEBOOK["fit"](run)
        results = NOTEBOOK["evaluate_best"](run)
        with (
            helpers.atomic_write(path, 4 * len(results.truth)) as temporary,
            open(temporary, "wb") as file,
        ):
            np.savez(
                file,
                alone=results.alone == results.truth,
                mean=results.correct,
                viterbi=results.decoded == results.truth,
                **{
                    key: [row[key] for row in history]
                    for key in ("seconds", "train_acc", "val_acc")
                },
                frames_a_parameter=len(run.train_loader.dataset)
                / sum(map(torch.numel, run.model.parameters())),
            )
        for file in ("checkpoint.pt", "best.pt"):
            (path.parent / file).unlink()
    return np.load(path)


def interval(difference, frames, samples=2000):
    """95% bootstrap interval, over the utterances, of a difference in accuracy (percent)."""
    which = np.random.default_rng(23).integers(len(frames), size=(samples, len(frames)))
    return np.percentile(100 * difference[which].sum(1) / frames[which].sum(1), [2.5, 97.5])


def draw(rows, path):
    """Draw each recipe's accuracy by the number of epochs, at the end and on the way there."""
    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for i, recipe in enumerate(dict.fromkeys(recipe for _, recipe in rows)):
        ends = {
            epochs: 100 * np.mean([result["val_acc"] for result in results], axis=0)
            for (epochs, name), results in rows.items()
            if name == recipe
        }
        for epochs, values in ends.items():
            axis.plot(range(1, epochs + 1), values, color=f"C{i}", alpha=0.3, linewidth=1)
        axis.plot(
            list(ends),
            [values[-1] for values in ends.values()],
            "o-",
            color=f"C{i}",
            label=f'recipe "{recipe}"',
        )
    axis.set_xscale("log")
    axis.set_xticks(sorted({epochs for epochs, _ in rows}), sorted({epochs for epochs, _ in rows}))
    axis.minorticks_off()
    axis.set(
        xlabel="epochs in all (thin lines: during the training)", ylabel="validation accuracy (%)"
    )
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--epochs", type=int, nargs="+", default=[3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[23])
    parser.add_argument("--recipes", nargs="+", default=["original", "best"])
    parser.add_argument("--width", type=int, default=WIDTH, help="of the pencil's hidden layers")
    parser.add_argument(
        "--match-noise",
        action="store_true",
        help="lower the dropout of a narrow pencil accordingly",
    )
    parser.add_argument("--folder", type=Path, default=common.ROOT / "runs" / "accuracy")
    arguments = parser.parse_args()
    narrow(arguments.width, arguments.match_noise)
    os.environ |= {"HW1P2_DATA": str(arguments.data), "HW1P2_RUNS": str(arguments.folder)}
    rows = {}
    for epochs in arguments.epochs:
        for seed in arguments.seeds:
            for recipe in dict.fromkeys(["original", *arguments.recipes]):
                rows.setdefault((epochs, recipe), []).append(
                    train(config_of(recipe, epochs), seed, arguments)
                )
    offsets = helpers.AudioDataset(arguments.data, "dev-clean", 0).offsets.numpy()
    frames = np.diff(offsets)
    best = {key: value for key, value in config_of("best", 1).items() if key in helpers.ORIGINAL}
    ratios = sorted({f"{result['frames_a_parameter']:.2g}" for result in sum(rows.values(), [])})
    noise = ", noise-matched" if arguments.match_noise else ""
    common.report(
        "Accuracy",
        data=f"{arguments.data.name}; {offsets[-1]:,} dev-clean frames, {len(frames)} utterances",
        network=f"pencil, {arguments.width} wide{noise}, context "
        f"{NOTEBOOK['config']['context']}, batch {NOTEBOOK['config']['batch_size']}, "
        f"{helpers.pick_precision(common.DEVICE)}; frames per parameter {', '.join(ratios)}",
        seeds=", ".join(map(str, arguments.seeds)),
        best=re.sub(r'["{}]', "", json.dumps(best)),
    )
    print(
        "validation accuracy, %, mean over the seeds [lowest - highest]: the network alone, frame\n"
        "by frame; points more than the original's, with a 95% interval over the utterances; the\n"
        "mean over warps; Viterbi; seconds of a training epoch; the first epoch in which the\n"
        "network alone is as good as the original's best. Below, the network alone after every\n"
        "epoch, and its accuracy while training\n"
    )
    for (epochs, recipe), results in rows.items():
        alone, mean, viterbi = (
            [100 * result[name].mean() for result in results]
            for name in ("alone", "mean", "viterbi")
        )
        gain = sum(
            np.add.reduceat(ours["alone"].astype(int) - base["alone"], offsets[:-1])
            for ours, base in zip(results, rows[epochs, "original"])
        ) / len(results)
        low, high = interval(gain, frames)
        dev, training, seconds = (
            np.mean([result[key] for result in results], axis=0)
            for key in ("val_acc", "train_acc", "seconds")
        )
        goal = np.mean([result["val_acc"].max() for result in rows[epochs, "original"]])
        reached = f"epoch {1 + (dev >= goal).argmax()}" if dev.max() >= goal else "never"
        print(
            f"{epochs:3d} epochs  {recipe:32} "
            f"{np.mean(alone):6.2f} [{min(alone):.2f} - {max(alone):.2f}]  "
            f"{100 * gain.sum() / frames.sum():+5.2f} [{low:+.2f} - {high:+.2f}]  "
            f"{np.mean(mean):6.2f}  {np.mean(viterbi):6.2f}  {seconds.mean():6.1f} s  {reached}"
        )
        for name, values in (("val", dev), ("training", training)):
            print(f"{'':12}{name:9}", *(f"{100 * value:.1f}" for value in values))
    if len(arguments.epochs) > 1:
        draw(rows, arguments.folder / "epochs.png")
        print(f"\na picture of it is in {arguments.folder / 'epochs.png'}")


if __name__ == "__main__":
    main()
