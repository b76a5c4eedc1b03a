"""One record per paper, and the small check of what became of it."""
