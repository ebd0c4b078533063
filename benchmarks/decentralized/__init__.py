"""Decentralized methods compared: one harness, and a module for each task."""
