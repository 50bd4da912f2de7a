"""Programs whose figures the docs quote; run from a checkout, not part of the wheel."""
