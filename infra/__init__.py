"""The ground floor: object storage, experiment tracking, configuration, the console, and what a cluster needs."""
