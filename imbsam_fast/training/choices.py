"""What TrainStep's settings can be; without torch, so that a command line can list them."""

EXACT_PLANS = ("auto", "joint", "split")
PLANS = (*EXACT_PLANS, "sampled")
SAMPLE = 0.25  # the share of a batch in the sampled plan's sample, unless told otherwise
BATCH_NORM_UPDATES = ("once", "twice")
PERTURBATIONS = ("global", "local")
