"""Training and evaluating a classifier on one's own images."""
