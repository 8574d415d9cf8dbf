"""Many methods, one text, one table: what fewbits compare does."""
