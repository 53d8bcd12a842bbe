"""Reports on runs from what they left: `python -m lsiq.report --help`. Listing needs neither torch nor pandas."""
