"""Experiments: configuration, the graph of stages with their content keys, and what was launched."""
