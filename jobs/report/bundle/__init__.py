"""A bundle for reviewers: one zip of an experiment's results, and its tables and report rendered again from it."""
