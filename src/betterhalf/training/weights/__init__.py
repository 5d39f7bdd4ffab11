"""Weight stores, which hold FP32 masters, gradients and computing parameters, and yield the weights for the engine."""
