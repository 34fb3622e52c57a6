"""Runs: their folders, labels, metrics and provenance, and reading them back."""
