"""Key files, which bring a hidden concept back, and their absorption into weights."""
