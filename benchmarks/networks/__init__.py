"""The models that are trained, as plain functions of their weights."""
