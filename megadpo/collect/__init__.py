"""Collecting rollouts: prompts -> answers of an OpenAI-compatible server, each with a reward. See docs/collecting.md."""
