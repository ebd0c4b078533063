"""What is said where a job cannot be run as asked."""


class DataError(Exception):
    """A data file is missing, or is not what was published; the message says which, where, and what to do."""
