"""Commands that run trainings to check or measure them."""
