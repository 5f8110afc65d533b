"""Task-batched operations, one folder each."""
