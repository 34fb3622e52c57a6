"""The method. Read `loop.py` first."""
