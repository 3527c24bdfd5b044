"""What is a file: errors, files, tables, options, processes."""
