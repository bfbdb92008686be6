"""Data sets, models, metrics and training recipes behind `imbsam-fast train`."""
