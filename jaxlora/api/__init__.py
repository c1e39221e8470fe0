"""The public classes; thin."""
