"""Any annotation file as one memory-mapped table, the map-style dataset over it, and the loaders that batch
it.
"""
