"""Models: vision encoders, the Q-Former with its losses, and what is built from them."""
