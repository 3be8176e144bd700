"""Edits without training: the shared solver, the token rows that it is given, and what is kept."""
