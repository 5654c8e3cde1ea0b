"""KempnerForge's own sinks for ``[[metrics.sinks]]``: one module each, with ``PLUGIN``."""
