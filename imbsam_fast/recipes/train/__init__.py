"""`imbsam-fast train`: runs of every method, from their first epoch to their test."""
