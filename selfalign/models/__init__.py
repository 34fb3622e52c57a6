"""Policies: fetched, checked, kept, tokenised for, and read for log-probabilities."""
