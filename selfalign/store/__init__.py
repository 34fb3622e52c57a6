"""Artifacts keyed by content: made once, found again, never half there."""
