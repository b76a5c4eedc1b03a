"""Decoding methods, one paper a file: how the next token is chosen."""
