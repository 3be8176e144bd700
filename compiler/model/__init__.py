"""A checkpoint as passes see it: sites, weights and text states; and the edits that change it."""
