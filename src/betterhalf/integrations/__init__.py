"""Adapters that other frameworks plug into."""
