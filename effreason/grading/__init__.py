"""Cuts the answer out of a response and compares it with the reference answer; imports no jax."""
