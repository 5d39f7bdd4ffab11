"""The trainer's model: loading it from the hub, a folder, a GGUF file or this package, and its packed attention."""
