"""Programs for those who change the project: its structure, and what is written from its code."""
