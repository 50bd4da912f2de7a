"""A bundle in use: update, evaluation, benchmark; torch is not needed."""
