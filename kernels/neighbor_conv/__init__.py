"""neighbor_conv on GPUs: ``launches`` is where an op comes in."""
