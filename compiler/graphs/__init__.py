"""ONNX graphs: traced without weights, linked to a checkpoint's tensors, and compared with torch.

Running them is in ``runtime``.
"""
