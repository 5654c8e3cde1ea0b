"""KempnerForge's own losses, one a module. ``PLUGIN`` of a module is what ``train.loss`` names."""
