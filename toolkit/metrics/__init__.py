"""Measures of classifiers and of sets of images."""
