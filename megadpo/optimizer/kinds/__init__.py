"""The optimizers, one file each. They are read and checked without torch."""
