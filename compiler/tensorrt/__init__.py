"""Engines of TensorRT and TensorRT-RTX: building, describing, checking, running and patching them."""
