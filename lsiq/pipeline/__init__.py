"""The block loop: a model, a method and a number format in, quantised blocks out."""
