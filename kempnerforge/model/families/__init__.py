"""KempnerForge's own models: one module each, whose ``PLUGIN`` builds the model from ``[model]``."""
