"""What both backends share. Nothing here imports a framework."""
