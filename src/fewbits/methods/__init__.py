"""One published method a file, in families."""
