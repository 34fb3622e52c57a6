"""The ground floor: errors, files, records and the processes of a run; it knows nothing of models."""
