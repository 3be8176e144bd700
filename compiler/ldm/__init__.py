"""The original single-file layout: names of its tensors and modules, and the configs that it does not hold."""
