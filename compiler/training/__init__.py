"""Edits by training: the denoiser, the student and its loop, and the data that it is shown."""
