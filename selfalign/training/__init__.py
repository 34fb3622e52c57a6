"""Training: settings, objective, optimizers, parallelism, resumption, splits, checkpoint selection."""
