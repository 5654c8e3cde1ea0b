"""What a run cost: the ledger of its attempts, and what follows from it. No torch."""
