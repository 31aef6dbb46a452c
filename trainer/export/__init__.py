"""A trained translation as a file for other programs."""
