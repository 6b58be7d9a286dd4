"""What the commands ask of this backend: recording, benchmarks, facts about the machine."""
