"""A rendered world of coloured shapes on which a small BLIP-2 learns in minutes on a CPU."""
