"""Whole training steps: which passes run, on which rows, on how many ranks."""
