"""Images as class folders: reading, splits, contact sheets."""
