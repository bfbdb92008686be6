"""What TrainStep's settings can be; without torch, so that a command line can list them."""

PLANS = ("auto", "joint", "split")
BATCH_NORM_UPDATES = ("once", "twice")
PERTURBATIONS = ("global", "local")
