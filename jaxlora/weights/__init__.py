"""Storage formats of a Linear's weight; each is a leaf that multiplies."""
