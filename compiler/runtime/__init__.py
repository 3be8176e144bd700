"""Pictures from what was built, with whatever runs it: backends, schedulers, seeds and tokenizer."""
