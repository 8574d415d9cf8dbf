"""Which layer gets which option within a budget of bits: what is measured, and how the budget is shared out."""
