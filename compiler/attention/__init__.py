"""Cross-attention in torch that also reads memories, which are extra rows of keys and values.

``pipeline`` opens a folder that has them. Inference without torch is in ``runtime``.
"""
