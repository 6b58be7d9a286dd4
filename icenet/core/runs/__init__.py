"""What IceNet writes to disk and opens again: folders of runs, checkpoints, saved models."""
