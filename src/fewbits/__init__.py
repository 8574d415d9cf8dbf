"""Neural networks, their caches and signals in few bits, and exactly what was lost."""
