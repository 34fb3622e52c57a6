"""Training: objective, optimiser, parallelism, resumption."""
