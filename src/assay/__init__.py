"""Sixty deep-learning methods from the literature, each one a component with its evidence."""

__version__ = "0.1.0"
