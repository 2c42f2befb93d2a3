"""How many sequences go through the model at once where a configuration leaves that open: forecast, probe, decision."""
