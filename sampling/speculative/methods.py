"""The methods of decoding faster, by name: what a record of one may say.

`layers.record.build(record, METHODS)` makes a method, whose rule and tree are records too:
{"class_path": "Chain", "init_args": {"drafts": 4, "rule": {"class_path": "Weighted", "init_args": {"delta": 2.0}}}}.
A method has `exactness` and `generate`.
"""

from sampling.speculative.chain_decode import Chain
from sampling.speculative.jacobi_decode import SJD
from sampling.speculative.rules import Exact, Grouped, Weighted
from sampling.speculative.tree_decode import Dynamic, Lantern, Static, Tree

METHODS: dict[str, type] = {made.__name__: made for made in (Chain, SJD, Tree, Lantern)}
METHODS |= {made.__name__: made for made in (Exact, Weighted, Grouped, Static, Dynamic)}  # rules and trees
