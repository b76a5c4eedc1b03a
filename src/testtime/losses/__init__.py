"""Losses to train with, where a method needs a model that was trained for it; one paper a file."""
