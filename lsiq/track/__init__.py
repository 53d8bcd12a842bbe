"""Tracking: the terminal and the trackers that mirror a run's record."""
