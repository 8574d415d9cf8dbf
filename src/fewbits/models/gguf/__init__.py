"""What GGUF files hold: blocks of codes, names of tensors and settings, the tokenizer; and how they are read."""
