"""How fast do batches come? The usual way, and whole epochs of helpers.make_loader.

    python tests/benchmarks/batches.py                     about a minute on two cores
    python tests/benchmarks/batches.py --full              over an epoch of the real data's size

Batches of 2048 frames with 50 on either side, on the device that training would use. Without masks,
with FreqMask on 70% of the batches (as in training) and on all, with Both on 70%. The usual way has
as many workers as suit it best.
Each side has a process of its own, so that neither works in memory that the other has left.
The data are random numbers; --data takes a folder of others.
Target: at least 5 times as fast with masks.
"""

import json

import common
import torch

import helpers

MASKS = {
    "no masks": (None, 0),
    "FreqMask on 70%": ("FreqMask", 0.7),
    "FreqMask on all": ("FreqMask", 1),
    "Both on 70%": ("Both", 0.7),
}


def ours(loader, masks, share):
    """Frames a second over one epoch, as the notebook's `train` takes them.

    As with `usual`, the first batch is not counted.
    """
    count = 0
    for i, (frames, phonemes) in enumerate(loader):
        if masks and torch.rand(()) < share:
            helpers.mask_frames(frames, masks)
        if i:
            count += len(phonemes)
        else:
            start = common.clock()
    speed = count / (common.clock() - start)
    loader.sampler.set_epoch(loader.sampler.epoch + 1)
    return speed


def usual(dataset, batch, workers, batches):
    """Frames a second over so many batches of an epoch.

    The first batch, for which the order is drawn, is not counted.
    """
    count = 0
    for i, (frames, labels) in enumerate(common.usual_loader(dataset, batch, workers)):
        frames, labels = frames.to(common.DEVICE), labels.to(common.DEVICE)
        if i:
            count += len(labels)
        else:
            start = common.clock()
        if i == batches:
            break
    return count / (common.clock() - start)


def measure_side(arguments):
    """In the process that is measured: print the frames/s with each of the masks as JSON."""
    batch, speeds, workers = arguments.batch, {}, ""
    if arguments.side == "ours":
        dataset = helpers.AudioDataset(
            arguments.data, context=arguments.context, device=common.DEVICE
        )
        loader = helpers.make_loader(dataset, batch, shuffle=True)
        ours(loader, "Both", 1)  # a first epoch, not timed: memory is taken from the system
        for name, (masks, share) in MASKS.items():
            speeds[name] = ours(loader, masks, share)
    else:
        dataset = common.UsualDataset(arguments.data, context=arguments.context)
        best, workers = common.best_workers(
            lambda n: usual(dataset, batch, n, arguments.usual_batches)
        )
        for name, (masks, share) in MASKS.items():
            dataset.set_masks(masks, share)
            speeds[name] = usual(dataset, batch, best, arguments.usual_batches)
    print(json.dumps({"frames": len(dataset), "speeds": speeds, "workers": workers}))


def main():
    parser = common.parser(__doc__.splitlines()[0], utterances=(1000, 1, 1))
    parser.set_defaults(random=True)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--context", type=int, default=50)
    parser.add_argument(
        "--usual-batches", type=int, default=60, help="so many of the usual way's epoch"
    )
    parser.add_argument("--side", help="for internal use")
    arguments = parser.parse_args()
    if arguments.side:
        return measure_side(arguments)
    with common.corpus(arguments) as (data, description):

        def measure(side):
            return common.fresh_process(
                __file__,
                "--side",
                side,
                "--data",
                data,
                "--batch",
                arguments.batch,
                "--context",
                arguments.context,
                "--usual-batches",
                arguments.usual_batches,
            )

        results = common.alternate(
            {side: lambda side=side: measure(side) for side in ("usual", "ours")}, arguments.runs
        )
    first = {side: runs[0] for side, runs in results.items()}
    common.report(
        "Batches",
        data=f"{description}; {first['ours']['frames']:,} training frames for ours, "
        f"{first['usual']['frames']:,} for the usual way",
        batch=f"{arguments.batch} frames, context {arguments.context}",
        workers=first["usual"]["workers"],
        runs=f"{arguments.runs} of each side, alternating, each in a fresh process: "
        f"a whole epoch of ours, {arguments.usual_batches} batches of the usual way's",
    )
    for name in MASKS:
        print(name)
        common.print_table(
            {side: [run["speeds"][name] for run in runs] for side, runs in results.items()},
            "frames/s",
        )


if __name__ == "__main__":
    main()
