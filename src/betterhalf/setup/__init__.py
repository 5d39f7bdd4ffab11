"""From a configuration to device, data and run folder: the steps that training and examining share."""
