"""Training: the step, the loop, validation, and what is seen of them."""
