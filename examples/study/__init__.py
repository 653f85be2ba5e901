"""Does MPO do in the small what its paper says? A study over methods, learning rates, seeds and tasks."""
