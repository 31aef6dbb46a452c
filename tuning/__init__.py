"""Searches: many trainings that differ in some options, planned by Ray Tune."""
