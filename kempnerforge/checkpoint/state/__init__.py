"""Convert training state to flat tensors and JSON values, and back."""
