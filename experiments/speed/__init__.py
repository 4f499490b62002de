"""The benchmark of the attention operations alone, on a GPU."""
