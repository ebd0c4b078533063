"""Public data sets: where they come from, and what the tasks take of them."""
