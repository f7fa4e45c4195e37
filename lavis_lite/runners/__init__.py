"""The training loop and what it needs: setting up, continuing, evaluating."""
