"""One term or transform a file: how numbers are stored."""
