"""Errors, files, tables, options and processes."""
