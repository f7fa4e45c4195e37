"""Vision encoders on timm, and the tower that freezes, casts and calls any of them."""
