"""The runner, its metrics, results on disk, and the report."""
