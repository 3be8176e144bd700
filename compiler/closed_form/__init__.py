"""Edits without training: the solver of all closed-form passes, and the text states that they give to it.

The methods are in ``passes``.
"""
