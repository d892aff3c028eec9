"""Cluster job system: stages, runs, arrays, failures, statistics. Knows nothing of audio."""
