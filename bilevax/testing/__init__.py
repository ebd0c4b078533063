"""Contracts that methods keep, for the tests of methods written elsewhere; problems whose solutions are known."""
