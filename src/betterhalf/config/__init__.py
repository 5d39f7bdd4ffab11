"""Configuration: the strict schema, and loading it from TOML and the command line; imports no torch."""
