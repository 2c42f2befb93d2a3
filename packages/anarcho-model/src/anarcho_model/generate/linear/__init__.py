"""Products of a few rows with weights that stay; one module per framework."""
