"""Run notebook cells and Python functions as jobs on any pool; results come back as variables."""
