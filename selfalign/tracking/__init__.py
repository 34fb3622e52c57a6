"""Weights & Biases: metrics, tables, workspaces."""
