"""Text data: from files (`sources`, `reading`) over tokens (`prepare`, `token_file`, `cache`) to batches of packed
sequences (`packed`) or of single documents (`documents`)."""
