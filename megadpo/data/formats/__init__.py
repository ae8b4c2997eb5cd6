"""Rows -> preference pairs, by format."""
