"""Packaging lives in pyproject.toml; this file is where the CUDA C++ extension will be declared."""

from setuptools import setup

setup()
