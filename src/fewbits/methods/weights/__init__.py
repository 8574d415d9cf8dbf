"""Methods that compress the weights of linear layers."""
