"""Text to token ids and back: encoding, chat templates, incremental detokenizing with stop strings."""
