"""Data that people give: rows of their files as records, text filters and pair rules."""
