"""Collects rollouts: answers of an OpenAI-compatible server to prompts, each with a reward. See docs/collecting.md."""
