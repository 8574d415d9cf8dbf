"""Modules that hold compressed tensors and compute with them."""
