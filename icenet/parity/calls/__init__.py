"""The calls that both sides of a comparison make: their events and pairs, runs, and replays of each call alone."""
