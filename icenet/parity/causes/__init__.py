"""Known causes of differences: each is tried on the reference (`search`), by subject in one file each."""
