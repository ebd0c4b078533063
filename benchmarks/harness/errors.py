"""What is said where a job cannot be run as asked."""


class DataError(Exception):
    """A job cannot run as asked: a file of data, results or methods, the machine or the job itself does not allow it.

    The message says what is wrong, where, and what to do; it is printed without a traceback.
    """
