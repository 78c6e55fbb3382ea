"""Arithmetic over a configuration: FLOPs, memory, bounds."""
