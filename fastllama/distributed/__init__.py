"""Processes and devices: sharding, compilation, determinism, the flight recorder."""
