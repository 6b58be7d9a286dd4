"""Text generation without a framework: prompts, requests, sampling rules, stopping criteria, the decoding loop."""
