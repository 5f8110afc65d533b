"""What is measured on a GPU: ceilings, single operations, whole meta-steps against peers."""
