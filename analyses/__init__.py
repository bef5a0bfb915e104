"""Analyses: from recorded runs to labelled tables."""
