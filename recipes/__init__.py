"""The pipeline, one stage after another; only the command line and the public API import it."""
