"""Tensors between device, host memory and disk."""
