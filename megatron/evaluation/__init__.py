"""Likelihoods with error bars, downstream tasks, adapters for lm-eval."""
