"""Strategies: how a model is spread over processes. A strategy wraps the model; the runner does the rest."""
