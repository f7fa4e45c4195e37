"""The commands of `lavis-lite`, each with its arguments; what they do is done elsewhere, imported when it runs."""
