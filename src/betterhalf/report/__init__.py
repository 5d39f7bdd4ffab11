"""Figures and the self-contained page, made from run folders alone; imports no torch."""
