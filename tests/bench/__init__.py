"""Measurements as commands: `python -m tests.bench [NAME ...]`. Nothing here is a test."""
