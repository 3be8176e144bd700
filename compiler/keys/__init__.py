"""Key files, which bring a hidden concept back, and the absorption of keys into weights."""
