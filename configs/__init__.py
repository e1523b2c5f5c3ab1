"""The run configurations (YAML) and, in published/, what can be loaded."""
