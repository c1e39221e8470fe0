"""Rows and images to numpy batches; no accelerator needed."""
