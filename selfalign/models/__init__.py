"""Policies: fetched, checked, stored, tokenised for, and scored."""
