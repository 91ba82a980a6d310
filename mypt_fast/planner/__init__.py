"""Predict the memory and the speed of training before it starts. No torch, no NumPy, no GPU."""
