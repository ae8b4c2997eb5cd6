"""The demo: sums whose answers can be checked, a model that trains in minutes, and its score."""
