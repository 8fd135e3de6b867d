"""The Hugging Face hub: downloads, catalogue, uploads with a model card."""
