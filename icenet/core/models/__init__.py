"""What a model has on either backend: its base class, initial values, padding for compiled functions."""
