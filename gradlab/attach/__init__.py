"""The instrument on somebody else's training loop."""
