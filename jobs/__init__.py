"""Cluster job system: stages, runs, arrays, failures, statistics. Knows nothing of audio."""

PACKAGE = "ser-grid"  # its name when it is installed
VERSION = "0.4.0"  # of the package; results that no commit belongs to state it
