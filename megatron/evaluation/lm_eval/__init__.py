"""Adapters for lm-eval."""
