"""How fast does it train? The usual loop and the notebook's own `train`, with the pencil network.

    python tests/benchmarks/training.py                         about a minute on two CPU cores
    python tests/benchmarks/training.py --batch 8192 --steps 200        a GPU
    python tests/benchmarks/training.py --full                  whole epochs of the real data's size, for one H100

The limit is the matrix products of a step alone, in the same precision, measured in the same run: forward, gradient
of the weights, and of the input except in the first layer. They are 110.7 million operations a frame. A profile of our
step says what the rest is spent on.
Targets: two CPU cores at least 75% of the limit; one H100 at least 2.4 million frames/s at batch 2048, 3.6 million at
8192, and 20 times the usual loop.
"""

import re
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import common
import notebook
import torch
from torch import nn

import helpers

NOTEBOOK = notebook.definitions(mixed=True)
DTYPE = NOTEBOOK["amp_dtype"]
# in this order, the first pattern that is found in the name of an operation (CPU) or kernel (GPU)
GROUPS = {"matrix products": r"aten::(add)?mm$|gemm|cutlass|nvjet|xmma|cublas|splitk",
          "optimizer": r"adam|multi_tensor|_foreach|lerp",
          "batch norm": r"batch_norm|batchnorm",
          "dropout": r"dropout|bernoulli|aten::random_|aten::mul$|aten::div_$",
          "activation": r"leaky_relu",
          "data and masks": r"index|gather|bitwise|searchsorted|aten::rand|aten::(ge|lt|neg|split)$|distribution",
          "copies and casts": r"copy|memcpy|memset|fill|zero_|cat",
          "sums, for bias gradients": r"aten::sum|reduce"}


class Steps:
    """`n` batches of a loader, which begins anew when it ends; looks like the loader to `train`."""

    def __init__(self, loader, n):
        self.loader, self.n, self.sampler = loader, n, getattr(loader, "sampler", SimpleNamespace(epoch=0))
        self.dataset = getattr(loader, "dataset", None)
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
    """A new network, and how it is trained: `usual` by the usual loop, else by the notebook's."""

    def __init__(self, config, usual=False):
        torch.manual_seed(23)
        self.config, self.usual = config, usual
        self.model = NOTEBOOK["Network"]((2 * config["context"] + 1) * helpers.COEFFICIENTS, len(helpers.PHONEMES),
                                         config).to(common.DEVICE)
        # the usual precision on a GPU is float16 with a scaler; on a CPU both sides have the same
        self.dtype = torch.float16 if usual and common.DEVICE == "cuda" else DTYPE
        self.optimizer = (torch.optim.AdamW(self.model.parameters(), lr=config["learning_rate"],
                                            weight_decay=config["weight_decay"])
                          if usual else NOTEBOOK["make_optimizer"](config, self.model))
        self.scaler = torch.amp.GradScaler(common.DEVICE, enabled=self.dtype == torch.float16)

    def train(self, batches):
        """Train on the batches; returns (seconds, what the loop returned)."""
        start = common.clock()
        if self.usual:
            result = common.usual_train(self.model, batches, NOTEBOOK["criterion"], self.optimizer, self.scaler,
                                        self.dtype)
        else:
            result = NOTEBOOK["train"](self.model, batches, NOTEBOOK["criterion"], self.optimizer, self.scaler,
                                       self.config)
        return common.clock() - start, result


def limit(model, batch, repeats):
    """Frames/s if a step were its matrix products and nothing else, and the operations of a frame."""
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    seconds = operations = 0
    for i, layer in enumerate(layers):
        n, m = layer.in_features, layer.out_features
        x, g = (torch.randn(batch, size, device=common.DEVICE).to(DTYPE) for size in (n, m))
        weight, bias = layer.weight.detach().to(DTYPE), layer.bias.detach().to(DTYPE)
        products = [lambda x=x, w=weight, b=bias: nn.functional.linear(x, w, b), lambda x=x, g=g: g.T @ x]
        if i:
            products.append(lambda g=g, w=weight: g @ w)
        for product in products:
            product()
            start = common.clock()
            for _ in range(repeats):
                product()
            seconds += (common.clock() - start) / repeats
            operations += 2 * n * m
    return batch / seconds, operations


def profile(trainer, batches, rows=12):
    """Where the time of our step goes, in % of the operations' own time, by group and by operation."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if common.DEVICE == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        seconds, _ = trainer.train(batches)
    times = {}
    for event in profiler.key_averages():
        on_gpu = event.device_type == torch.autograd.DeviceType.CUDA
        annotation = getattr(event, "is_user_annotation", False) or event.key.startswith(("Optimizer.", "ProfilerStep"))
        if on_gpu == (common.DEVICE == "cuda") and not (on_gpu and annotation):
            times[event.key] = event.self_device_time_total if on_gpu else event.self_cpu_time_total
    total = sum(times.values()) or 1
    groups = dict.fromkeys([*GROUPS, "other"], 0)
    for key, value in times.items():
        groups[next((name for name, pattern in GROUPS.items() if re.search(pattern, key, re.I)), "other")] += value
    print(f"Profile of our step: {total / 1e6 / len(batches) * 1e3:.1f} ms of operations in "
          f"{seconds / len(batches) * 1e3:.1f} ms with the profiler on")
    for group, value in sorted(groups.items(), key=lambda item: -item[1]):
        print(f"  {group:26} {value / total:6.1%}")
    print("  the operations that take most")
    for key, value in sorted(times.items(), key=lambda item: -item[1])[:rows]:
        print(f"    {value / total:6.1%}  {value / 1e3 / len(batches):9.3f} ms a step  {key[:80]}")
    print(flush=True)


def print_memory():
    if common.DEVICE == "cuda":
        print(f"peak GPU memory: {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB allocated, "
              f"{torch.cuda.max_memory_reserved() / 2**30:.2f} GiB reserved; ", end="")
    print(f"peak host memory: {common.peak_memory() / 2**30:.2f} GiB\n", flush=True)


def best_workers(config, usual_data, steps):
    """The number of DataLoader workers with which the usual loop is fastest, and its frames/s with each number."""
    trainer = Trainer(config, usual=True)
    speeds = {}
    for workers in common.worker_counts():
        batches = Steps(common.usual_loader(usual_data, config["batch_size"], workers), steps)
        trainer.train(batches)
        speeds[workers] = steps * config["batch_size"] / trainer.train(batches)[0]
    return max(speeds, key=speeds.get), speeds


def compare(arguments, config, data, description):
    """The usual loop, ours and the limit, alternating."""
    batch, steps = config["batch_size"], arguments.steps
    dataset = helpers.AudioDataset(data, context=config["context"], device=common.DEVICE)
    usual_data = common.UsualDataset(data, context=config["context"], limit=arguments.usual_limit,
                                     masks=config["augmentations"])
    loader = helpers.make_loader(dataset, batch, shuffle=True)
    if min(len(dataset), len(usual_data)) < batch:
        raise SystemExit(f"{len(dataset):,} frames are less than a batch of {batch}: take a larger corpus")
    # whole batches only: the speed of the last, smaller one is another one
    loader.sampler.length -= loader.sampler.length % batch
    usual_data.length -= usual_data.length % batch
    workers, speeds = best_workers(config, usual_data, min(steps, 4))
    usual, usual_batches = Trainer(config, usual=True), Steps(common.usual_loader(usual_data, batch, workers), steps)
    ours, original = Trainer(config), Trainer({**config, **helpers.ORIGINAL})
    batches = Steps(loader, steps)
    sides = {"usual": lambda: steps * batch / usual.train(usual_batches)[0]}
    sides["ours"] = lambda: steps * batch / ours.train(batches)[0]
    sides['ours, recipe "original"'] = lambda: steps * batch / original.train(batches)[0]
    model = Trainer(config).model
    sides["matrix products alone (the limit)"] = lambda: limit(model, batch, max(5, steps // 8))[0]
    usual.train(Steps(usual_batches, 2))  # memory, libraries; not timed
    ours.train(Steps(loader, 3))
    original.train(Steps(loader, 3))
    if common.DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    common.report("Training", data=f"{description}; {len(dataset):,} training frames",
                  network=f"pencil, context {config['context']}, batch {batch}, masks {config['augmentations']}",
                  precision=f"ours and the limit {DTYPE}, usual {usual.dtype}",
                  workers=f"the usual way has {workers}, its best of "
                          + ", ".join(f"{n}: {speed:,.0f} frames/s" for n, speed in speeds.items()),
                  runs=f"{arguments.runs} of each side, alternating, {steps} steps each, after a warm-up")
    results = common.alternate(sides, arguments.runs)
    common.print_table(results, "frames/s")
    top = results.pop("matrix products alone (the limit)")
    operations = limit(model, batch, 1)[1]
    print(f"the limit: {operations / 1e6:.1f} million operations a frame, "
          f"{operations * statistics.median(top) / 1e12:.3f} T/s")
    for name, values in results.items():
        # each run against the limit measured right behind it, so that a busy machine slows both
        shares = [value / high for value, high in zip(values, top)]
        print(f"{name}: {statistics.median(shares):.1%} of the limit [{min(shares):.1%} - {max(shares):.1%}]")
    print_memory()
    profile(ours, Steps(loader, min(steps, 10)))


def whole(arguments, config, data, description, cache):
    """Load a corpus of the real size, train whole epochs in every way, predict the test set."""
    begin = time.perf_counter()

    def left(needed, what):
        spent = time.perf_counter() - begin
        if spent + needed < 60 * arguments.minutes:
            return True
        print(f"left out, as {spent:.0f} s are spent and it may take {needed} s: {what}", flush=True)
        return False

    common.report("Training on the whole", data=description, precision=f"{DTYPE}", network="pencil")
    for what in ("first load, writes the cache", "second load, from the cache"):
        start = common.clock()
        datasets = [helpers.AudioDataset(data, partition, config["context"], device=common.DEVICE, cache=cache)
                    for partition in helpers.PARTITIONS]
        print(f"{what}: {common.clock() - start:.1f} s; "
              + ", ".join(f"{len(dataset):,}" for dataset in datasets) + " frames in train, dev, test; ", end="")
        print_memory()
    train_data, dev_data, test_data = datasets

    speeds = {}
    for batch in arguments.batches:
        name = f"batch {batch}"
        if not left(60, name):
            continue
        if common.DEVICE == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        trainer = Trainer({**config, "batch_size": batch})
        loader = helpers.make_loader(train_data, batch, shuffle=True)
        for epoch in range(1, arguments.epochs + 2):
            loader.sampler.set_epoch(epoch)
            seconds, (loss, accuracy) = trainer.train(loader)
            print(f"{name}: epoch {epoch} {seconds:.2f} s, {len(train_data) / seconds:,.0f} frames/s, "
                  f"loss {loss:.4f}, accuracy {accuracy:.2%}{' (with warm-up)' if epoch == 1 else ''}", flush=True)
            if epoch > 1:
                speeds.setdefault(name, []).append(len(train_data) / seconds)
        top, operations = limit(trainer.model, batch, 20 if common.DEVICE == "cuda" else 5)
        print(f"{name}: {statistics.median(speeds[name]) / top:.1%} of the limit, {top:,.0f} frames/s, "
              f"{operations * top / 1e12:.2f} T/s; ", end="")
        print_memory()
        profile(trainer, Steps(loader, 10))
        evaluate(trainer, dev_data, test_data, batch)
    if left(90, "the usual loop"):
        against_usual(arguments, config, data, train_data)


def evaluate(trainer, dev_data, test_data, batch):
    """Seconds for the dev set's score, the test set's prediction, and the CSV."""
    loaders = [helpers.make_loader(dataset, 4 * batch) for dataset in (dev_data, test_data)]
    for note in (" (first time)", ""):
        start = common.clock()
        loss, accuracy = NOTEBOOK["eval"](trainer.model, loaders[0])
        scored = common.clock()
        predictions = NOTEBOOK["test"](trainer.model, loaders[1])
        predicted = common.clock()
        print(f"evaluation of dev {scored - start:.2f} s (loss {loss:.4f}, accuracy {accuracy:.2%}), prediction of "
              f"test {predicted - scored:.2f} s{note}")
    with tempfile.TemporaryDirectory() as temporary:
        start = time.perf_counter()
        helpers.write_submission(Path(temporary) / "submission.csv", predictions)
        print(f"CSV of {len(predictions):,} rows: {time.perf_counter() - start:.2f} s\n", flush=True)


def against_usual(arguments, config, data, train_data):
    """The usual loop on a part of the utterances, and ours beside it, alternating."""
    usual_data = common.UsualDataset(data, context=config["context"], limit=arguments.usual_limit or 300,
                                     masks=config["augmentations"])
    for batch in arguments.batches:
        if len(usual_data) < batch:
            continue
        config = {**config, "batch_size": batch}
        steps = min(arguments.steps, len(usual_data) // batch)
        workers, speeds = best_workers(config, usual_data, min(steps, 20))
        usual, ours = Trainer(config, usual=True), Trainer(config)
        usual_batches = Steps(common.usual_loader(usual_data, batch, workers), steps)
        our_batches = Steps(helpers.make_loader(train_data, batch, shuffle=True), 10 * steps)
        usual.train(Steps(usual_batches, 3))
        ours.train(Steps(our_batches, 3))
        print(f"batch {batch}, {arguments.runs} runs, alternating: {steps} steps of the usual loop ({workers} "
              f"workers, its best of { {n: round(speed) for n, speed in speeds.items()} }) and {10 * steps} of ours")
        common.print_table(common.alternate({
            "usual": lambda b=usual_batches, t=usual: steps * batch / t.train(b)[0],  # noqa: B023
            "ours": lambda b=our_batches, t=ours: 10 * steps * batch / t.train(b)[0]},  # noqa: B023
            arguments.runs), "frames/s")


def main():
    parser = common.parser(__doc__.splitlines()[0], utterances=(40, 4, 4))
    gpu = common.DEVICE == "cuda"
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--batches", type=int, nargs="+", default=[2048, 8192], help="with --full")
    parser.add_argument("--context", type=int, default=50)
    parser.add_argument("--steps", type=int, default=200 if gpu else 6, help="a run")
    parser.add_argument("--epochs", type=int, default=1, help="with --full, timed ones after a first epoch")
    parser.add_argument("--usual-limit", type=int, help="only so many utterances for the usual way")
    parser.add_argument("--minutes", type=float, default=9, help="with --full: what does not fit is left out")
    parser.add_argument("--whole", action="store_true", help="what --full measures, on a corpus of --utterances")
    arguments = parser.parse_args()
    full = arguments.whole or arguments.utterances == common.FULL
    config = {**NOTEBOOK["config"], "context": arguments.context, "batch_size": arguments.batch}
    with common.corpus(arguments) as (data, description):
        if full:
            with tempfile.TemporaryDirectory() as cache:
                whole(arguments, config, data, description, cache)
        else:
            compare(arguments, config, data, description)


if __name__ == "__main__":
    main()
