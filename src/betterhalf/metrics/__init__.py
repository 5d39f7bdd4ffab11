"""What is measured, and where it is written; imports no torch."""
