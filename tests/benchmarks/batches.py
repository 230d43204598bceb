"""How fast do batches come? The usual way, and whole epochs of helpers.make_loader.

    python tests/benchmarks/batches.py                                  about a minute on two cores
    python tests/benchmarks/batches.py --full --usual-limit 5000     ours over an epoch of the real data's size

Batches of 2048 frames with 50 on either side, on the device that training would use. Without masks, with FreqMask on
70% of the batches (as in training) and on all, with Both on 70%. The usual way has as many workers as suit it best.
The data are random numbers; --data takes a folder of others.
Targets: at least 20 times as fast without masks and 15 times with them.
"""

import common
import torch

import helpers

MASKS = {"no masks": (None, 0), "FreqMask on 70%": ("FreqMask", 0.7), "FreqMask on all": ("FreqMask", 1),
         "Both on 70%": ("Both", 0.7)}


def ours(loader, masks, share):
    """Frames a second over one epoch, as the notebook's `train` takes them."""
    start, count = common.clock(), 0
    for frames, phonemes in loader:
        if torch.rand(()) < share:
            helpers.mask_frames(frames, masks)
        count += len(phonemes)
    loader.sampler.set_epoch(loader.sampler.epoch + 1)
    return count / (common.clock() - start)


def usual(dataset, batch, workers, batches):
    """Frames a second over so many batches of an epoch; the first, for which the order is drawn, is not counted."""
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


def main():
    parser = common.parser(__doc__.splitlines()[0], utterances=(1000, 1, 1))
    parser.set_defaults(random=True)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--context", type=int, default=50)
    parser.add_argument("--usual-batches", type=int, default=60, help="so many of the usual way's epoch")
    parser.add_argument("--usual-limit", type=int, help="only so many utterances for the usual way")
    arguments = parser.parse_args()
    with common.corpus(arguments) as (data, description):
        dataset = helpers.AudioDataset(data, context=arguments.context, device=common.DEVICE)
        loader = helpers.make_loader(dataset, arguments.batch, shuffle=True)
        plain = common.UsualDataset(data, context=arguments.context, limit=arguments.usual_limit)
        speeds = {workers: usual(plain, arguments.batch, workers, arguments.usual_batches)
                  for workers in common.worker_counts()}
        workers = max(speeds, key=speeds.get)
        common.report("Batches", data=f"{description}; {len(dataset):,} training frames for ours, {len(plain):,} for "
                      "the usual way", batch=f"{arguments.batch} frames, context {arguments.context}",
                      workers=f"the usual way has {workers}, its best of "
                              + ", ".join(f"{n}: {speed:,.0f} frames/s" for n, speed in speeds.items()),
                      runs=f"{arguments.runs} of each side, alternating: a whole epoch of ours, "
                           f"{arguments.usual_batches} batches of the usual way's")
        ours(loader, "Both", 1)  # a first epoch, not timed: memory is taken from the system
        for name, (masks, share) in MASKS.items():
            plain.set_masks(masks, share)
            print(name)
            common.print_table(common.alternate({
                "usual": lambda: usual(plain, arguments.batch, workers, arguments.usual_batches),
                "ours": lambda masks=masks, share=share: ours(loader, masks, share)}, arguments.runs), "frames/s")


if __name__ == "__main__":
    main()
