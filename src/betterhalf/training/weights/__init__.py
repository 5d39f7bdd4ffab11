"""Weight stores: where FP32 masters, gradients and the weights that compute are held, and how they leave."""
