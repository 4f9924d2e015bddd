"""Kernels for CUDA GPUs: one file a kernel, `launch` calls them, `backend` is their face to the table."""
