"""From text to token files, and what one asks of them."""
