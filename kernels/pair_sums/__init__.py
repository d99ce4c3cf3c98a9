"""pair_sums on GPUs: ``launches`` is where an op comes in."""
