"""The contracts: tensors as sums of terms, methods and their roles, errors."""
