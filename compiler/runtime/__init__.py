"""Images from what was built, in any runtime: components, schedulers, random numbers and the tokenizer."""
