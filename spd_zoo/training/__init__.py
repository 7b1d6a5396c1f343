"""Training and evaluating networks on your own images."""
