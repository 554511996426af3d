"""Packaging is declared in pyproject.toml; this file is where the optional C++ extension is built."""

from setuptools import setup

setup()
