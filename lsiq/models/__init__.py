"""Models: what the package knows of each family, how checkpoints are read, and one block as a pure function."""
