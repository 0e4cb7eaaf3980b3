"""Masks that run by tiles: their factors, and gradients of those. What backends share."""
