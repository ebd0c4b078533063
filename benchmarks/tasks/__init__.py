"""Bilevel problems, a job for each, and the methods that are compared on them."""
