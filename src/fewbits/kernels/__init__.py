"""Kernels that compute with packed codes; plain torch is their definition."""
