"""Frozen language models behind one interface: decoder-only and encoder-decoder, on transformers."""
