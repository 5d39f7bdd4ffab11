"""The public Python functions. `betterhalf` re-exports them, and imports a module of this package on first use."""
