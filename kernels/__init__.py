"""Triton kernels, one op a file; packaged as `pyembed.kernels`."""
