"""How much memory a run needs, worked out from shapes: nothing is allocated, downloaded or trained."""
