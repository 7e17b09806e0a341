"""Verification of everything in a run directory."""
