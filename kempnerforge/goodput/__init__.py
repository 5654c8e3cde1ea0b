"""Where the time of a run was spent: the ledger of its attempts and its analysis. Does not import torch."""
