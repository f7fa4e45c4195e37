"""What every part stands on; knows nothing of vision or language."""
