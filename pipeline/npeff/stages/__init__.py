"""Stages of a run, one folder each."""
