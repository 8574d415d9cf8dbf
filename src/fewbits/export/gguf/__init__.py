"""How a compressed model becomes a GGUF file; what such files hold, and how they are read, is in models/gguf."""
