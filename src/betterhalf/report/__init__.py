"""Figures and the self-contained page, drawn from run folders alone; imports no torch."""
