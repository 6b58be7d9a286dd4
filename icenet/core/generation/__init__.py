"""Generation without a framework: requests, prompts, sampling rules, the loop over tokens."""
