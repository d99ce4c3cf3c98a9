"""What can be said of the GPU kernels without a GPU: their instructions, their resources and their predicted times."""
