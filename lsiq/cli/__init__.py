"""The command line: where its configuration files lie, and what its first word may be."""
