"""Engines of TensorRT and TensorRT-RTX: built, described, checked, run and patched."""
