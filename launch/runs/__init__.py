"""Trainings and evaluations, each a folder of its own: configuration, wiring, what is written down."""
