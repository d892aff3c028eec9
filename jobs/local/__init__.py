"""Executor for this machine: worker processes forked from a server that has imported the heavy packages."""
