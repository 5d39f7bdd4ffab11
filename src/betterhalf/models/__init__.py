"""The trainer's model: loading from hub, folder, GGUF or this package, and attention over packed sequences."""
