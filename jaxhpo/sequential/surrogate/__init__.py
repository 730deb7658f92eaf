"""Models of the loss as a function of the point, which sequential search learns from its trials."""
