"""A bundle for reviewers: one zip of an experiment's results, and the tables rendered again from it."""
