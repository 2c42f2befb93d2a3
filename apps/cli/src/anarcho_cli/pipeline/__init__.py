"""Chains of commands that a TOML file lists, of which only those run again whose inputs changed."""
