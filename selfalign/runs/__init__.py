"""A run: its folder, what it made, where that came from, and how it is read back."""
