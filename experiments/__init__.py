"""Runs, their directories and what is made of them."""
