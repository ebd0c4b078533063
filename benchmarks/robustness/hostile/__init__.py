"""Good files for readers, and hostile ones that keep the form of these."""
