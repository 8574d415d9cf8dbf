"""Methods that compute with activations in few bits."""
