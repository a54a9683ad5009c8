"""Pretraining: the loop on Accelerate, and what it needs."""
