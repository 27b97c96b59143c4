"""Packaging of cure-plugin: all of it stands in pyproject.toml."""

from setuptools import setup

setup()
