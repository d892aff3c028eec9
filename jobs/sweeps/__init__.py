"""Sweeps: Ray Tune over the cluster counts of P-TAPT, scored on speakers that are neither trained on nor tested."""
