"""Edits by training: the denoiser, the student, the training loop, and the training data.

The methods are in ``passes``.
"""
