"""Quantities of a decomposition: one module each."""
