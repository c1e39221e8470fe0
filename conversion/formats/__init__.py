"""Tensors that another library quantised."""
