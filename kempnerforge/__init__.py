"""KempnerForge: training runs described by one TOML file that survive being killed at any instant."""

__version__ = "0.1.0"
