"""Stochastic gradient descent, with momentum if ``args`` sets it."""

import torch

PLUGIN = torch.optim.SGD
