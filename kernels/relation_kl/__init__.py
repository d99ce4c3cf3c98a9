"""relation_kl on GPUs: ``launches`` is where an op comes in."""
