"""Advantages, importance ratios and policy losses, composed from a few small choices; pure functions of tensors."""
