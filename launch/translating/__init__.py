"""Translating images, folders and prepared data with what was trained: `launch/translate.py`."""
