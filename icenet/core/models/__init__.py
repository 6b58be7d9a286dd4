"""Models without a framework: the base class, building, initial values, dropout keys, padding of compiled models."""
