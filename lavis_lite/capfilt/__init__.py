"""CapFilt (section 3.4 of the paper): captions for web pictures, sampled from a captioner, the web's own among them,
of which a ranker keeps the best."""
