"""Entry scripts that a person types, which parse and call, and the jobs that they call, which wire the packages together:
trainings, evaluations, benchmarks."""
