"""Simulated and decoded accept length, the n-gram baseline, and the report."""
