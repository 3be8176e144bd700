"""Passes: one erasure method per file, found by name through erasec.registry."""
