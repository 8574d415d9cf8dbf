"""Real models, found by structure."""
