"""What TrainStep's settings can be; without torch, so that a command line can list them."""

EXACT_PLANS = ("auto", "joint", "split")
PLANS = (*EXACT_PLANS, "sampled")
BATCH_NORM_UPDATES = ("once", "twice")
PERTURBATIONS = ("global", "local")
