"""Makes preference pairs for training from NeMo Gym rollouts (several answers to a prompt, each with a reward)."""
