"""erasec: a model-editing compiler for text-to-image diffusion checkpoints."""
