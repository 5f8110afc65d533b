"""Examples that run: ``python -m examples.<name>`` from the root of the repository; README.md lists them."""
