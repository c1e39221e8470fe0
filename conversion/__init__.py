"""Names, layouts and bytes of checkpoints; needs no JAX."""
