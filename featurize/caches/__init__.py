"""Feature caches that others made, read as they lie on disk, so that nobody computes twice."""
