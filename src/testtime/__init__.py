"""testtime makes a trained model better while it is being used, without labels."""

__version__ = "0.1.0"
