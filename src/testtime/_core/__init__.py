"""The cellar: errors, registry, outcomes, seeds and files. Imports nothing else of testtime."""
