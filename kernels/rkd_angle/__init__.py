"""rkd_angle on GPUs: ``launches`` is where an op comes in."""
