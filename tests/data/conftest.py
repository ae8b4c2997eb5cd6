"""Hypothesis without its clock: a slow or busy machine is no failure."""

from hypothesis import settings

settings.register_profile("no_deadline", deadline=None, max_examples=60)
settings.load_profile("no_deadline")
