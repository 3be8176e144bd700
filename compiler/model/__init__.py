"""A checkpoint as passes see it: sites, weights, text states; the edits that change it, edit files, and extras.

File formats of weights are in ``checkpoint``.
"""
