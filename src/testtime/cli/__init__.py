"""Thin: parses, calls, prints. One file per command."""
