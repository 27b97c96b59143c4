"""Copies of those modules that the generator runs."""
