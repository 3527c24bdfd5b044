"""Kinds of label, a file for each: see `base`."""
