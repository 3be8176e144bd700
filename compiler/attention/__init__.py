"""Memories in torch: attention processors that read them, and the pipeline of a bundle."""
