"""The original single-file layout (LDM): reading it, its tensor and module names, and the configs that it lacks.

Writing it is in ``targets.ldm``.
"""
