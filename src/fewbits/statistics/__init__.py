"""What is gathered about the inputs of a linear layer."""
