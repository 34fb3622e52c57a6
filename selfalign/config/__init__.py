"""The tree of all settings."""
