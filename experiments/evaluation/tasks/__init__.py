"""What can be measured on a checkpoint: one interface, ``base.Task``."""
