"""The comparison of the two backends on one configuration: `icenet parity CONFIG`."""
