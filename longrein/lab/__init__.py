"""Experiments: environments and algorithms brought together, run, recorded and drawn."""
