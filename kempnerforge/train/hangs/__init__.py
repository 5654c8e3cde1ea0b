"""Detect steps and saves that take far too long, and record what every rank was doing."""
