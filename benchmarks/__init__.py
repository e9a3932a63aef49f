"""Benchmarks: each prints what it compares, with versions, and the share of this machine's limits that is reached."""
