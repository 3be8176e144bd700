"""Sampling from built folders in ONNX Runtime, OpenVINO, TensorRT or torch: guidance, schedulers and the tokenizer."""
