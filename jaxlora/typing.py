"""The letters of every shape annotation, and the aliases that more than one module needs.

B batch (rows), S query position, T key position, D width, H query heads, K key/value heads, G = H // K, C head width,
F MLP width, V vocabulary, L layers, R rank, I and O a Linear's in and out features, M segments a row, N tokens,
P data shards, W vision patches (padded), E patch elements (channels x frames x height x width).
"""

from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree, Shaped, UInt8, UInt32

__all__ = ["Array", "Bool", "Float", "Int", "PRNGKeyArray", "PyTree", "Shaped", "UInt8", "UInt32"]
