"""The operators on packed codes as Triton kernels, for tensors on a GPU; the package triton is asked for where one is computed with."""
