"""Code that both backends share. No module here imports a framework."""
