"""Procedural worlds that need no download: their pictures, texts, questions and small frozen backbones."""
