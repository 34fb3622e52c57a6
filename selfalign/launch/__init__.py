"""A run started, rehearsed, swept, continued, measured, pushed to a hub."""
