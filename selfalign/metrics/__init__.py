"""Metrics: their catalogue, sums, intervals, judge quality and bounds."""
