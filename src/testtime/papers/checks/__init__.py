"""One file per paper: its small check."""
