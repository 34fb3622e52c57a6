"""Published benchmarks, one module a kind; `protocol.py` is what they share."""
