"""The HTML report of an experiment: one file with figures, tables and the runs, for any browser, without network access."""
