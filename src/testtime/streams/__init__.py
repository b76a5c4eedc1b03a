"""What arrives, in which order, and how far it has shifted: data sets, corruptions, scenarios."""
