"""Generators of long-context tasks in text: RULER, needle heat maps, recall from JSON. Imports nothing."""
