"""Engines of TensorRT and TensorRT-RTX: building, checking, running and patching them; the base of both targets."""
