"""lsiq from Python: what `import lsiq` offers, made of the parts that the command line is made of."""
