"""The benchmark of training steps, on one GPU and on several."""
