"""A reference that was recorded on another machine."""
