"""What is measured: names, intervals, judge quality, limits."""
