"""Commands: what each command of launch.py does, one module a command, and what it prints."""
