"""Runs, dry runs, sweeps, evaluations and pushes to a hub."""
