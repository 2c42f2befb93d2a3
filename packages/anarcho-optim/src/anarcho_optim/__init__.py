"""Muon and AdamW in one optimizer, with learning-rate schedules."""
