"""The tiny configs of the tests: what they change in the notebook's own."""

# seconds on a CPU
TINY = {
    "archetype": "pyramid",
    "num_layers": 2,
    "context": 5,
    "batch_size": 256,
    "epochs": 2,
}

# where it does not matter how much is learned
QUICK = {**TINY, "batch_size": 1024}

# nothing in it is planned for the number of epochs, so that more of them may follow
UNPLANNED = {**QUICK, "scheduler": "steplr", "dropout_scale": 1}

# dropout and masks draw from the random states, which a resume must bring back too
RANDOM = {**TINY, "epochs": 4, "dropout_alternate": False, "augmentations": "Both"}

# no random numbers after the initialization, and no additions of ours: what a textbook does
PLAIN = {
    **TINY,
    "num_layers": 3,
    "context": 2,
    "batch_norm": False,
    "dropout": 0,
    "augmentations": None,
    "warp": 0,
    "dropout_scale": 1,
    "lr_scale": 1,
}
