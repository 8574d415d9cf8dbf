"""What was lost: measurements of a model, alone or against a reference."""
