"""The ground floor: errors, files, records and the processes of a run. It knows nothing of models."""
