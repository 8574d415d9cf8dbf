"""Formats of files that other engines read, one a file."""
