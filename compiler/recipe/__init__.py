"""What a build is asked to do: the recipe, and the concepts that it erases."""
