"""The original single-file layout (LDM): its tensor and module names, and the configs that such a file lacks."""
