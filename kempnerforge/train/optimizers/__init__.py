"""KempnerForge's optimizers: each module is one, by the name that a config gives.

``PLUGIN`` is a class like those of ``torch.optim``, or a function from parameter groups and keyword
arguments to an optimizer or a dict of optimizers by name. To add one, add a module.
"""
