"""Models without a framework: the base class, building, initial values, twins, padding of compiled models."""
