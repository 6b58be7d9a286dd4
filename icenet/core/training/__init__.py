"""The training loop and what it needs: schedules, initial weights, and the notices at the start of a run."""
