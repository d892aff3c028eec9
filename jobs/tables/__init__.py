"""Tables: summary of results, LaTeX, Markdown and CSV, published figures."""
