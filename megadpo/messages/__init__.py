"""Reads chat messages and items of OpenAI's Responses API, and converts one into the other."""
