"""Profiles of whole programs: where the time of meta-learning goes, and what to do about it."""
