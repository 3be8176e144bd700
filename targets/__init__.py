"""Targets: one output format per file, found by name through erasec.registry."""
