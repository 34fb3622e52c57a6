"""What people give: rows of their files as records, filters, pair rules, splits, prompts."""
