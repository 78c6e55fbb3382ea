"""Logs of a run: rows, clocks, sinks, the plot."""
