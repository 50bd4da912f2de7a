"""What is measured of classifiers and of sets of images."""
