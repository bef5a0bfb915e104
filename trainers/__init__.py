"""Trainers: sharing schemes, environments, PPO and the one training loop."""
