"""Training around the loop: set-up, results, side jobs, skipped updates, stopping."""
