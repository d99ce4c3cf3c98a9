"""What the ops' kernels and launchers share."""
