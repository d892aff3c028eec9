"""Proof and measurement of this project on a GPU: `make gpu-check` (docs/gpu-check.md). Parts run one after another, each in a process."""
