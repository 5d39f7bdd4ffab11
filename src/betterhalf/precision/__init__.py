"""Half precision: formats, dtype roles, loss scaling, CPU layers with FP32 sums, FP32 islands, precision contract."""
