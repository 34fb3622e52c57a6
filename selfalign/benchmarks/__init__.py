"""Published benchmarks, one module for each kind; `protocol.py` holds what they share."""
