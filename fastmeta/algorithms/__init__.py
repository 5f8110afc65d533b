"""Meta-learning algorithms: configuration and meta-parameters over one engine."""
