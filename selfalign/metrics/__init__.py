"""What is measured: names and meanings, sums, intervals, judge quality, limits."""
