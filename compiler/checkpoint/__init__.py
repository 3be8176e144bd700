"""Checkpoints as files: safetensors, diffusers folders, pickles, in-place edits and staged writing."""
