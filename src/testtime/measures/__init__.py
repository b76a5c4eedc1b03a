"""Pure functions of tensors: entropies, divergences, calibration and uncertainty scores."""
