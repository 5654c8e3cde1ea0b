"""The launcher: start the ranks of a run, restart them after a fault, end them. Does not import torch."""
