"""NeMo RL's keys that this config has not got: refused, noted, or translated."""
