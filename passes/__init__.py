"""Erasure methods, one paper per file, named in ``erasec.registry``. A pass computes an edit and writes no files."""
