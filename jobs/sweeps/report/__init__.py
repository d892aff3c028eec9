"""Report of a sweep: summary, tables, plots, costs, choice."""
