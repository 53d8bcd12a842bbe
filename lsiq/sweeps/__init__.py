"""Many runs by one command: what is finished already, grids and searches."""
