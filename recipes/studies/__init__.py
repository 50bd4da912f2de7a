"""Comparisons of methods on one data set, and the demo."""
