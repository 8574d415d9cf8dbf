"""Compressed models as files, one target a module."""
