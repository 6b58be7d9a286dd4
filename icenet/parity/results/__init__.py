"""The result of a comparison: its report, the tree of its modules, its page."""
