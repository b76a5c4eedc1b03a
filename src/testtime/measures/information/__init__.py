"""Entropy and mutual information of continuous variables, estimated from samples."""
