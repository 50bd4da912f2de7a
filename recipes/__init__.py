"""Procedures, read top to bottom. Nothing but the command line imports them."""
