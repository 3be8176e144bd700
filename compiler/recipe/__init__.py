"""The input of a build: the recipe, the concepts that it erases, and the limits of its checks."""
