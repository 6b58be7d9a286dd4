"""The writer: from a graph to the text of a port, class by class and statement by statement."""
