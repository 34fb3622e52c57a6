"""Runs started, rehearsed, swept, continued, pushed."""
