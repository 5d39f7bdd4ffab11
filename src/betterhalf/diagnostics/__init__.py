"""Pure measurements of how far trainer and engine are apart; nothing here runs a model."""
