"""One run, from a composed configuration to its record."""
