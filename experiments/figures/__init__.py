"""Figures and tables of studies, from their rows alone: ``python -m experiments.figures OUTPUT STUDY...``."""
