"""What runs in place of torch's own calls, to keep less, compute less, or normalise otherwise."""
