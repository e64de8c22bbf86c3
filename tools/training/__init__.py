"""What the training scripts of the embedded models share."""
