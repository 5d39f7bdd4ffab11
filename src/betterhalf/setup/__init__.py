"""Steps from a configuration to device, data and run folder, shared by training and examination."""
