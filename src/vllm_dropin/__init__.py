"""Turns a model folder into a production service on vLLM."""

__version__ = "0.1.0"
