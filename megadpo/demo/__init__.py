"""The demo's world: sums whose right answer can be checked, a model small enough to train in minutes, and its score."""
