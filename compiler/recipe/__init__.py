"""The input of a build: the recipe, and the concepts that it erases."""
