"""AdamW (arXiv:1711.05101)."""

import torch

PLUGIN = torch.optim.AdamW
