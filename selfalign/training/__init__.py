"""Training: settings, objectives, optimisers, parallelism, resumption, splits, checkpoint selection."""
