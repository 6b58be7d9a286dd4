"""The training loop and what it needs: schedules, initial weights, notices."""
