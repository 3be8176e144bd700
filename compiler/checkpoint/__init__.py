"""Files of checkpoints: safetensors, diffusers folders, pickles, in-place edits, and folders written atomically.

What the tensors mean is in ``model`` and ``family``.
"""
