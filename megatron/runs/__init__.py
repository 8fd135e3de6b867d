"""Run directories: their records, written and read here only, and what they show side by side."""
