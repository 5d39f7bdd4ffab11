"""Look at a model without training it: `probe` and `doctor`, and what they are made of."""
