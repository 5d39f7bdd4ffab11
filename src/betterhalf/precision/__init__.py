"""Half precision: formats, dtype roles, loss scaling, linear layers with FP32 sums, and the contract of both sides."""
