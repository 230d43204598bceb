"""How fast does it train? The usual loop and the notebook's own `train`, with the pencil network.

    python tests/benchmarks/training.py                         about a minute on two CPU cores
    python tests/benchmarks/training.py --batch 8192 --steps 200        a GPU

The limit is the matrix products of a step alone, in the same precision, measured in the same run: forward, gradient
of the weights, and of the input except in the first layer. They are 110.7 million operations a frame. A profile of our
step says what the rest is spent on.
"""

import re
import statistics
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
        """Train on the batches; returns the seconds."""
        start = common.clock()
        if self.usual:
            common.usual_train(self.model, batches, NOTEBOOK["criterion"], self.optimizer, self.scaler, self.dtype)
        else:
            NOTEBOOK["train"](self.model, batches, NOTEBOOK["criterion"], self.optimizer, self.scaler, self.config)
        return common.clock() - start


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
        seconds = trainer.train(batches)
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
        speeds[workers] = steps * config["batch_size"] / trainer.train(batches)
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
    ours, original = Trainer(config), Trainer({**config, **NOTEBOOK["ORIGINAL"]})
    batches = Steps(loader, steps)
    sides = {"usual": lambda: steps * batch / usual.train(usual_batches)}
    sides["ours"] = lambda: steps * batch / ours.train(batches)
    sides['ours, recipe "original"'] = lambda: steps * batch / original.train(batches)
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


def main():
    parser = common.parser(__doc__.splitlines()[0], utterances=(40, 4, 4))
    gpu = common.DEVICE == "cuda"
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--context", type=int, default=50)
    parser.add_argument("--steps", type=int, default=200 if gpu else 6, help="a run")
    parser.add_argument("--usual-limit", type=int, help="only so many utterances for the usual way")
    arguments = parser.parse_args()
    config = {**NOTEBOOK["config"], "context": arguments.context, "batch_size": arguments.batch}
    with common.corpus(arguments) as (data, description):
        compare(arguments, config, data, description)


if __name__ == "__main__":
    main()
