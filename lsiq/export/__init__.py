"""Export: a finished run in the layouts that other programs load."""
