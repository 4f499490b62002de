"""One checkpoint: what it scores, what it says, and its weights for others."""
