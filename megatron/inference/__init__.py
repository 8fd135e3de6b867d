"""Trained models ready to be asked: loading, logits, cached decoding."""
