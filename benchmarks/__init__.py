"""How fast fastmeta's meta-gradient is, how far from float64, and the same of every peer (docs/benchmarking.md)."""
