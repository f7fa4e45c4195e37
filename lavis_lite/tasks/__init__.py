"""What is measured on held-out data and how it is reported; the training loop belongs to the runner."""
