"""A cache and what reads into it; one module per framework."""
