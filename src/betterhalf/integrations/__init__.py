"""Adapters to other frameworks. Each imports its framework inside its own package only."""
