"""Detecting steps and saves that take far too long, and recording what every rank was doing."""
