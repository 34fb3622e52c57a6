"""Ways to score responses: one module a kind, each a config dataclass whose `judge` turns responses into judgements."""
