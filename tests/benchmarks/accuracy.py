"""How many more frames does each change to the training get right? Recipes side by side, by the notebook's functions.

    python tests/benchmarks/accuracy.py DATA                     the original's recipe and ours: 3 epochs, one seed
    python tests/benchmarks/accuracy.py DATA --epochs 3 10 --seeds 23 24 25 --recipes original warp=0.2 best
    python tests/benchmarks/accuracy.py DATA --width 128 --match-noise --epochs 3 12

DATA is a folder in the course's layout. A recipe is "best" (the notebook's config as it stands), "original" (that with
`recipe` "original"), or changes to the original's: key=value,key=value. What is trained is kept in --folder and not
trained again; killed, the next call goes on with the epoch. `test_warps` (1 or the notebook's) and `smoothing` need no
training of their own. `subset` is of the training data; the dev set stays whole.

--width narrows the pencil, so that a small set has as many frames a parameter as the course's has for the whole network
(1.8). The same dropout is more noise in a narrow layer: --match-noise lowers every rate p to the one with p / (1 - p)
in proportion to the width, the same noise in a sum over the layer's units as at 1600. accuracy.md keeps what was found.
"""

import argparse
import ast
import json
import re
from pathlib import Path
from types import SimpleNamespace

import common
import notebook
import numpy as np
import torch

import helpers

NOTEBOOK = notebook.definitions(mixed=True)
WIDTH = 1600
NOTEBOOK["show_progress"] = lambda history, config, *_: history and print(
    NOTEBOOK["describe"](history[-1], config["epochs"]), flush=True)


def config_of(recipe, epochs):
    """The config that a recipe's name stands for."""
    config = {**NOTEBOOK["config"], "epochs": epochs}
    if recipe != "best":
        config |= NOTEBOOK["ORIGINAL"]
    if "=" in recipe:
        for change in recipe.removeprefix("original,").split(","):
            key, value = change.split("=")
            try:
                config[key] = ast.literal_eval(value)
            except (ValueError, SyntaxError):
                config[key] = value
    NOTEBOOK["check_config"](config)
    return config


def narrow(width, match_noise):
    """Make the notebook's pencil `width` units wide; its dropout the same, or the same noise (see above)."""
    class Matched(NOTEBOOK["Dropout"]):
        def __init__(self, p):
            odds = p / (1 - p) * width / WIDTH
            super().__init__(odds / (1 + odds))

    NOTEBOOK["hidden_widths"] = lambda config: [width] * 7
    if match_noise:
        NOTEBOOK["Dropout"] = Matched


def train(config, seed, arguments):
    """What is kept of a run: the labels (n,) that the trained network gives the dev frames, in four ways; the accuracy
    after every epoch, training's and the dev set's, and its seconds; frames a parameter.
    """
    changes = [f"{key}={config[key]}" for key in config if key not in helpers.FREE_KEYS
               and (key == "epochs" or config[key] != {**NOTEBOOK["config"], **NOTEBOOK["ORIGINAL"]}[key])]
    network = [f"width={arguments.width}"] * (arguments.width != WIDTH) + ["match-noise"] * arguments.match_noise
    folder = arguments.folder / "-".join([arguments.data.name, *network, *changes, f"seed={seed}"])
    if not (folder / "labels.npz").exists():
        print(f"# {folder.name}", flush=True)
        torch.manual_seed(seed)
        train_data, val_data = (
            helpers.AudioDataset(arguments.data, partition, config["context"], subset, common.DEVICE,
                                 arguments.folder / "cache")
            for partition, subset in (("train-clean-100", config["subset"]), ("dev-clean", 1)))
        loaders = (helpers.make_loader(train_data, config["batch_size"], shuffle=True, seed=seed),
                   helpers.make_loader(val_data, 4 * config["batch_size"]))
        model = NOTEBOOK["Network"]((2 * config["context"] + 1) * helpers.COEFFICIENTS, len(helpers.PHONEMES),
                                    config).to(common.DEVICE)
        parts = NOTEBOOK["make_parts"](config, model)
        NOTEBOOK["begin"](config, parts, folder, train_data)
        history = NOTEBOOK["fit"](config, parts, *loaders, folder, SimpleNamespace(log=lambda *_, **__: None))
        model.load_state_dict(helpers.load_checkpoint(folder / "best.pt")["model"])
        decoder, labels = NOTEBOOK["Decoder"](train_data.labels, train_data.starts), {}
        for warps in (1, NOTEBOOK["config"]["test_warps"]):
            log_posteriors = NOTEBOOK["all_log_posteriors"](model, loaders[1], {**config, "test_warps": warps})
            decoder.choose(log_posteriors, val_data.labels, val_data.starts)
            labels[f"plain{warps}"] = log_posteriors.argmax(1).cpu()
            labels[f"decoded{warps}"] = decoder(log_posteriors, val_data.starts).cpu()
        with helpers.replacing(folder / "labels.npz", 32 * len(val_data)) as temporary, open(temporary, "wb") as file:
            np.savez(file, **labels,
                     **{key: [row[key] for row in history] for key in ("seconds", "train_acc", "val_acc")},
                     frames_a_parameter=len(train_data) / sum(weight.numel() for weight in model.parameters()))
        (folder / "checkpoint.pt").unlink()
        (folder / "best.pt").unlink()
    return np.load(folder / "labels.npz")


def right_of(config, seed, arguments, labels, starts):
    """Right frames of each utterance (utterances,), those of the network alone, and all that is kept of the run."""
    result = train(config, seed, arguments)

    def right(name):
        return np.add.reduceat(result[name] == labels, starts[:-1], dtype=int)
    plain, decoded = (right(f"{name}{config['test_warps']}") for name in ("plain", "decoded"))
    better = config["smoothing"] and decoded.sum() > plain.sum()  # the notebook's own choice
    return decoded if better else plain, right("plain1"), result


def interval(difference, frames, samples=2000):
    """95% bootstrap interval, over the utterances, of a difference in accuracy (percent)."""
    which = np.random.default_rng(23).integers(len(frames), size=(samples, len(frames)))
    return np.percentile(100 * difference[which].sum(1) / frames[which].sum(1), [2.5, 97.5])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--epochs", type=int, nargs="+", default=[3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[23])
    parser.add_argument("--recipes", nargs="+", default=["original", "best"])
    parser.add_argument("--width", type=int, default=WIDTH, help="of the pencil's hidden layers")
    parser.add_argument("--match-noise", action="store_true", help="lower the dropout of a narrow pencil accordingly")
    parser.add_argument("--folder", type=Path, default=common.ROOT / "runs" / "accuracy")
    arguments = parser.parse_args()
    narrow(arguments.width, arguments.match_noise)
    dev = helpers.AudioDataset(arguments.data, "dev-clean", 0)
    labels, starts = dev.labels.numpy(), dev.starts.numpy()
    frames = np.diff(starts)
    rows = {}
    for epochs in arguments.epochs:
        for seed in arguments.seeds:
            for recipe in dict.fromkeys(["original", *arguments.recipes]):
                rows.setdefault((epochs, recipe), []).append(
                    right_of(config_of(recipe, epochs), seed, arguments, labels, starts))
    best = {key: value for key, value in config_of("best", 1).items() if key in NOTEBOOK["ORIGINAL"]}
    frames_a_parameter = sorted({f"{result['frames_a_parameter']:.2g}" for _, _, result in sum(rows.values(), [])})
    common.report("Accuracy", data=f"{arguments.data.name}; {len(labels):,} dev frames in {len(frames)} utterances",
                  network=f"pencil, {arguments.width} wide{', noise-matched' * arguments.match_noise}, context "
                          f"{NOTEBOOK['config']['context']}, batch {NOTEBOOK['config']['batch_size']}, "
                          f"{NOTEBOOK['amp_dtype']}; {', '.join(frames_a_parameter)} frames a parameter",
                  seeds=", ".join(map(str, arguments.seeds)), best=re.sub(r'["{}]', "", json.dumps(best)))
    print("dev accuracy, %: mean over the seeds [lowest - highest]; the network alone, frame by frame; points more\n"
          "than the original's recipe, with a 95% interval over the utterances; seconds of a training epoch; the\n"
          "first epoch in which the network alone is as good as the original's best. Below: the network alone after\n"
          "every epoch, and its accuracy while training\n")
    for (epochs, recipe), results in rows.items():
        right, plain, kept = zip(*results)
        scores, alone = ([100 * each.sum() / len(labels) for each in counts] for counts in (right, plain))
        base = [result[0] for result in rows[epochs, "original"]]
        gain = np.sum(right, axis=0) / len(right) - np.sum(base, axis=0) / len(base)
        low, high = interval(gain, frames)
        dev, training, seconds = (np.mean([result[key] for result in kept], axis=0)
                                  for key in ("val_acc", "train_acc", "seconds"))
        goal = np.mean([result["val_acc"].max() for _, _, result in rows[epochs, "original"]])
        reached = f"epoch {1 + (dev >= goal).argmax()}" if dev.max() >= goal else "never"
        print(f"{epochs:3d} epochs  {recipe:32} {np.mean(scores):6.2f} [{min(scores):.2f} - {max(scores):.2f}]  "
              f"{np.mean(alone):6.2f}  {100 * gain.sum() / len(labels):+5.2f} [{low:+.2f} - {high:+.2f}]  "
              f"{seconds.mean():6.1f} s  {reached}")
        for name, values in (("dev", dev), ("training", training)):
            print(f"{'':12}{name:9}", *(f"{100 * value:.1f}" for value in values))


if __name__ == "__main__":
    main()
