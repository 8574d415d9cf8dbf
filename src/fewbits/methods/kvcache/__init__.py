"""Methods that write the keys and values of attention in few bits."""
