"""Entry scripts that a person types, which parse and call, and the jobs that they call, which wire the rooms together:
trainings, evaluations, benchmarks."""
