"""Networks, the training loop, evaluation, checkpoints and pictures."""
