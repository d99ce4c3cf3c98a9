"""node_contrast on GPUs: ``launches`` is where an op comes in."""
