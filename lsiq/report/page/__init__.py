"""One HTML page about one run or many: everything is in the file, and nothing is fetched."""
