"""How fast does it train? The usual loop and the notebook's own `train`, with the pencil network.

    python tests/benchmarks/training.py                         about a minute on two CPU cores
    python tests/benchmarks/training.py --batch 8192 --steps 200        a GPU

The limit is the matrix products of a step alone, in the same precision, measured in the same run:
forward, gradient of the weights, and of the input except in the first layer. They are 110.7 million
operations a frame.
"""

import statistics
from types import SimpleNamespace

import common
import torch
from support import notebook
from torch import nn

import helpers

NOTEBOOK = notebook.definitions()
DTYPE = helpers.pick_precision(common.DEVICE)
LIMIT = "matrix products alone (the limit)"


class Steps:
    """`n` batches of a loader, started again when it ends; looks like the loader to `train`."""

    def __init__(self, loader, n):
        self.loader, self.n, self.sampler = (
            loader,
            n,
            getattr(loader, "sampler", SimpleNamespace(epoch=0)),
        )
        self.dataset = loader.dataset
        self.batches = iter(())

    def __len__(self):
        return self.n

    def __iter__(self):
        for _ in range(self.n):
            batch = next(self.batches, None)
            if batch is None:
                self.batches = iter(self.loader)
                batch = next(self.batches)
            yield batch


class Trainer:
    """A new network, and how it is trained: by the usual loop, or as one of the notebook's runs."""

    def __init__(self, config, data, usual=False):
        torch.manual_seed(23)
        self.config, self.usual = config, usual
        self.model = NOTEBOOK["make_network"](config, data)
        # the usual precision on a GPU is float16 with a scaler; on a CPU both sides have the same
        self.precision = torch.float16 if usual and common.DEVICE == "cuda" else DTYPE
        self.criterion = NOTEBOOK["make_criterion"](config, data)
        self.optimizer = (
            torch.optim.AdamW(
                self.model.parameters(),
                lr=config["learning_rate"],
                weight_decay=config["weight_decay"],
            )
            if usual
            else NOTEBOOK["make_optimizer"](config, self.model)
        )
        self.scaler = torch.amp.GradScaler(common.DEVICE, enabled=self.precision == torch.float16)

    def train(self, batches):
        """Train on the batches (`Steps`). Returns frames/s."""
        start = common.clock()
        if self.usual:
            common.usual_train(
                self.model, batches, self.criterion, self.optimizer, self.scaler, self.precision
            )
        else:
            self.train_loader = batches
            NOTEBOOK["train"](self)
        return len(batches) * self.config["batch_size"] / (common.clock() - start)


def limit(model, batch, repeats):
    """Frames/s if a step were its matrix products and nothing else."""
    seconds = 0
    for i, layer in enumerate(layer for layer in model.modules() if isinstance(layer, nn.Linear)):
        x, g = (
            torch.randn(batch, size, device=common.DEVICE).to(DTYPE)
            for size in (layer.in_features, layer.out_features)
        )
        weight, bias = layer.weight.detach().to(DTYPE), layer.bias.detach().to(DTYPE)
        products = [
            lambda x=x, w=weight, b=bias: nn.functional.linear(x, w, b),
            lambda x=x, g=g: g.T @ x,
        ]
        if i:
            products.append(lambda g=g, w=weight: g @ w)
        for product in products:
            product()
            start = common.clock()
            for _ in range(repeats):
                product()
            seconds += (common.clock() - start) / repeats
    return batch / seconds


def main():
    parser = common.parser(__doc__.splitlines()[0], utterances=(40, 4, 4))
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--context", type=int, default=50)
    parser.add_argument(
        "--steps", type=int, default=200 if common.DEVICE == "cuda" else 6, help="a run"
    )
    arguments = parser.parse_args()
    batch, steps = arguments.batch, arguments.steps
    config = {**NOTEBOOK["config"], "context": arguments.context, "batch_size": batch}
    with common.corpus(arguments) as (data, description):
        dataset = helpers.AudioDataset(data, context=config["context"], device=common.DEVICE)
        usual_data = common.UsualDataset(
            data, context=config["context"], masks=config["augmentations"]
        )
    loader = helpers.make_loader(dataset, batch, shuffle=True)
    if min(len(dataset), len(usual_data)) < batch:
        raise SystemExit(
            f"{len(dataset):,} frames are less than a batch of {batch}: take a larger corpus"
        )
    # whole batches only: the speed of the last, smaller one is another one
    loader.sampler.length -= loader.sampler.length % batch
    usual_data.length -= usual_data.length % batch
    usual = Trainer(config, dataset, usual=True)
    workers, speeds = common.best_workers(
        lambda n: usual.train(Steps(common.usual_loader(usual_data, batch, n), min(steps, 4)))
    )
    sides = {
        "usual": (usual, Steps(common.usual_loader(usual_data, batch, workers), steps)),
        "ours": (Trainer(config, dataset), Steps(loader, steps)),
        'ours, recipe "original"': (
            Trainer({**config, **helpers.ORIGINAL}, dataset),
            Steps(loader, steps),
        ),
    }
    for trainer, batches in sides.values():
        trainer.train(Steps(batches.loader, 3))  # memory, libraries; not timed
    measures = {
        name: lambda trainer=trainer, batches=batches: trainer.train(batches)
        for name, (trainer, batches) in sides.items()
    }
    measures[LIMIT] = lambda: limit(usual.model, batch, max(5, steps // 8))
    common.report(
        "Training",
        data=f"{description}; {len(dataset):,} training frames",
        network=f"pencil, context {config['context']}, batch {batch}, "
        f"masks {config['augmentations']}",
        precision=f"ours and the limit {DTYPE}, usual {usual.precision}",
        workers=speeds,
        runs=f"{arguments.runs} of each side, alternating, {steps} steps each, after a warm-up",
    )
    results = common.alternate(measures, arguments.runs)
    common.print_table(results, "frames/s")
    top = results.pop(LIMIT)
    for name, values in results.items():
        # each run against the limit measured right after it, so that a busy machine slows both
        shares = [value / high for value, high in zip(values, top)]
        print(
            f"{name}: {statistics.median(shares):.1%} of the limit "
            f"[{min(shares):.1%} - {max(shares):.1%}]"
        )
    if common.DEVICE == "cuda":
        print(f"peak GPU memory: {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
