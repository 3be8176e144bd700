"""Key files, which bring a hidden concept back, and fitting a key into a model's weights.

The pass ``kpop`` makes keys.
"""
