"""Scores of predictions against a ground truth: plain tensors and strings in, numbers out."""
