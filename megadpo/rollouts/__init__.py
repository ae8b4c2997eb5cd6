"""NeMo Gym rollouts (several answers to a prompt, each with a reward) -> preference pairs that training reads."""
