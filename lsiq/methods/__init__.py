"""Methods: what turns the float weights of one block into codes. One file per method."""
