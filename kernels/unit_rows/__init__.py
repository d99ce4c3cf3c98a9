"""unit_rows on GPUs: ``launches`` is where an op comes in."""
