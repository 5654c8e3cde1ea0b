"""Training state as a flat tree of tensors and JSON values, and back."""
