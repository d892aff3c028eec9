"""The commands of launch.py and their output, one module per command."""
