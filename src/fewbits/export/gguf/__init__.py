"""What GGUF files hold: blocks of codes, the names of tensors and settings, and the tokenizer."""
