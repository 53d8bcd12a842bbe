"""What a run leaves on disk: its record and its quantised blocks."""
