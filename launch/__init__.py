"""Entry scripts that a person types. They parse, wire the rooms together and call; logic lives in the rooms."""
