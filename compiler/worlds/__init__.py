"""What the reference worlds share: their networks, and the trainer of models and judges."""
