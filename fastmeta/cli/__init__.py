"""The command line: train, eval, demo, doctor."""
