"""The method: `loop.py` is read first."""
