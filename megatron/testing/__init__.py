"""Conformance kit: what a model, a scorer or a trainer promises, checked against enumeration (docs/conformance.md).

``oracles`` works likelihoods out by enumeration, from any function that returns logits; ``checks`` raise an ``AssertionError``
with the numbers where something does not keep its promise. Nothing of them needs a model of this project.
"""
