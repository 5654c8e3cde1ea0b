"""A package of a user's that replaces everything a config can name. A test installs it beside its run."""

from __future__ import annotations

from pathlib import Path

MODULE = "lab"
DISTRIBUTION = "lab-1.0.dist-info"

SOURCE = '''
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from kempnerforge import Hook, Sink

VOCABULARY, WIDTH = 64, 16


class Mixer(nn.Module):
    def __init__(self, dropout):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        return x + self.dropout(self.down(F.gelu(self.up(self.norm(x)))))


class Model(nn.Module):
    def __init__(self, layers, dropout=0.1):
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.Sequential(*(Mixer(dropout) for _ in range(layers)))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens):
        return self.head(self.layers(self.tokens(tokens)))


class SignMomentum(torch.optim.Optimizer):
    """Keeps a tensor, a Python number and a counter of its group."""

    def __init__(self, params, lr=1e-3, momentum=0.9):
        super().__init__(params, {"lr": lr, "momentum": momentum, "updates": 0})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["updates"] += 1
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if not state:
                    state["mean"], state["calls"] = torch.zeros_like(param), 0
                state["calls"] += 1
                state["mean"].lerp_(param.grad, 1 - group["momentum"])
                scale = group["lr"] / math.sqrt(1 + 0.01 * state["calls"] + 0.01 * group["updates"])
                param.add_(state["mean"].sign(), alpha=-scale)


def zigzag(step, max_steps, period=4):
    return 1.0 - 0.1 * (step % period)


def smoothed(logits, targets, smoothing=0.0):
    return F.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), reduction="sum", label_smoothing=smoothing
    )


class Walks:
    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        return (np.random.default_rng(i).integers(VOCABULARY) + np.arange(33) * (1 + i % 3)) % VOCABULARY


class Noise(Hook):
    """Draws random numbers, which must not reach the training."""

    every_rank = True

    def on_step_end(self, step, metrics):
        torch.rand(5), np.random.rand(5)


class Lines(Sink):
    def __init__(self, file):
        self.file = open(file, "a")

    def write(self, row):
        self.file.write(f"{row['step']}\\n")
        self.file.flush()

    def close(self):
        self.file.close()
'''

ENTRY_POINTS = """[kempnerforge.plugins]
lab-model = lab:Model
lab-sgd = lab:SignMomentum
"""


def install(folder: Path) -> None:
    """Write the module, and the metadata of an installed package with entry points, into ``folder``."""
    (folder / f"{MODULE}.py").write_text(SOURCE)
    info = folder / DISTRIBUTION
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lab\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)


CONFIG = """
[run]
dir = "{folder}/run"

[model]
name = "lab:Model"
args = {{ layers = 2 }}

[data]
dataset = "lab:Walks"
args = {{ count = 60 }}
val = {{ dataset = "lab:Walks", args = {{ count = 8 }} }}

[train]
global_batch_size = 4
batch_size = 1
seq_len = 32
max_steps = {steps}
mixed_precision = "fp32"
loss = "lab:smoothed"
loss_args = {{ smoothing = 0.1 }}

[optimizer]
name = "lab:SignMomentum"
lr = 0.01
args = {{ momentum = 0.8 }}

[[optimizer.groups]]
match = "tokens"
lr_scale = 0.5

[scheduler]
name = "lab:zigzag"
args = {{ period = 3 }}

[eval]
interval = 5
num_batches = 2

[checkpoint]
interval = 2
keep_last_n = 2
async_mode = "async_with_pinned_mem"

[metrics]
log_interval = 1

[[metrics.sinks]]
name = "lab:Lines"
args = {{ file = "{folder}/lines.txt" }}

[[hooks]]
name = "lab:Noise"
"""
