"""How codes are chosen: pure functions of tensors."""
