"""Edits without training: the solver that all closed-form passes share, and the text states that they give to it."""
