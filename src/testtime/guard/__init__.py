"""Monitors that say when the world has moved and when a prediction is wrong, and what to do about it."""
