"""Fair comparisons: contestants, peers, shapes, timing, and the command `imbsam-fast bench`."""
