"""How many more frames does each change to the training get right? Recipes side by side, by the notebook's functions.

    python tests/benchmarks/accuracy.py DATA                     the original's recipe and ours: 3 epochs, one seed
    python tests/benchmarks/accuracy.py DATA --epochs 3 10 --seeds 23 24 25 --recipes original warp=0.2 best

DATA is a folder in the course's layout. A recipe is "best" (the notebook's config as it stands), "original" (that with
`recipe` "original"), or changes to the original's: key=value,key=value. What is trained is kept in --folder and not
trained again; killed, the next call goes on with the epoch. `test_warps` (1 or the notebook's) and `smoothing` need no
training of their own.
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


def train(config, seed, data, folder):
    """The labels (n,) that a trained network gives the dev frames, in four ways, and the seconds of its epochs."""
    changes = [f"{key}={config[key]}" for key in config if key not in helpers.FREE_KEYS
               and (key == "epochs" or config[key] != {**NOTEBOOK["config"], **NOTEBOOK["ORIGINAL"]}[key])]
    folder = folder / "-".join([data.name, *changes, f"seed={seed}"])
    if not (folder / "labels.npz").exists():
        print(f"# {folder.name}", flush=True)
        torch.manual_seed(seed)
        train_data, val_data = (helpers.AudioDataset(data, partition, config["context"], config["subset"],
                                                     common.DEVICE, folder.parent / "cache")
                                for partition in helpers.PARTITIONS[:2])
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
        with helpers.atomic_write(folder / "labels.npz", 32 * len(val_data)) as path, open(path, "wb") as file:
            np.savez(file, **labels, seconds=[row["seconds"] for row in history])
        (folder / "checkpoint.pt").unlink()
        (folder / "best.pt").unlink()
    return np.load(folder / "labels.npz")


def right_of(config, seed, arguments, labels, starts):
    """Right frames of each utterance (utterances,), those of the network alone, and the mean seconds of an epoch."""
    result = train(config, seed, arguments.data, arguments.folder)

    def right(name):
        return np.add.reduceat(result[name] == labels, starts[:-1], dtype=int)
    plain, decoded = (right(f"{name}{config['test_warps']}") for name in ("plain", "decoded"))
    better = config["smoothing"] and decoded.sum() > plain.sum()  # the notebook's own choice
    return decoded if better else plain, right("plain1"), result["seconds"].mean()


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
    parser.add_argument("--folder", type=Path, default=common.ROOT / "runs" / "accuracy")
    arguments = parser.parse_args()
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
    common.report("Accuracy", data=f"{arguments.data.name}; {len(labels):,} dev frames in {len(frames)} utterances",
                  network=f"{NOTEBOOK['config']['archetype']}, context {NOTEBOOK['config']['context']}, batch "
                          f"{NOTEBOOK['config']['batch_size']}, {NOTEBOOK['amp_dtype']}",
                  seeds=", ".join(map(str, arguments.seeds)), best=re.sub(r'["{}]', "", json.dumps(best)))
    print("dev accuracy, %: mean over the seeds [lowest - highest]; the network alone, frame by frame; points more\n"
          "than the original's recipe, with a 95% interval over the utterances; seconds of a training epoch\n")
    for (epochs, recipe), results in rows.items():
        right, plain, seconds = zip(*results)
        scores, alone = ([100 * each.sum() / len(labels) for each in counts] for counts in (right, plain))
        base = [result[0] for result in rows[epochs, "original"]]
        gain = np.sum(right, axis=0) / len(right) - np.sum(base, axis=0) / len(base)
        low, high = interval(gain, frames)
        print(f"{epochs:3d} epochs  {recipe:32} {np.mean(scores):6.2f} [{min(scores):.2f} - {max(scores):.2f}]  "
              f"{np.mean(alone):6.2f}  {100 * gain.sum() / len(labels):+5.2f} [{low:+.2f} - {high:+.2f}]  "
              f"{np.mean(seconds):6.1f} s")


if __name__ == "__main__":
    main()
