"""Calls of the `sampling-lantern` cases: neighbours, relaxed tests, trees, and the drafter."""

import torch
from torch import Tensor

from sampling.filters import Filter
from sampling.guidance import mix
from sampling.speculative import trees
from sampling.speculative.drafter import Drafter, DrafterState, lantern_drafter_from_published
from sampling.speculative.lantern import Relaxation, nearest_neighbours, verify_tree, verify_tree_greedy
from tests.goldens import Case, Check


def relaxation(check: Check) -> Relaxation:
    """Theirs reads one number: up to 1 it is delta, above it the factor."""
    delta = check.params["delta"]
    bound = {"delta": delta} if delta <= 1 else {"factor": delta}
    return Relaxation(check.inputs["neighbors"], check.params["k"], **bound, released=True)


def neighbors(case: Case, check: Check) -> dict[str, Tensor]:
    return {"neighbors": nearest_neighbours(check.inputs["codebook"])}


def relaxed_prob(case: Case, check: Check) -> dict[str, Tensor]:
    p = check.inputs["probs"]
    found = relaxation(check).borrow(p, check.inputs["tokens"], torch.ones_like(p[:, 0]))
    return {"prob": found.prob, "count": found.count, "tv": found.mass}


def in_rows(found: Tensor, last: int | None = None) -> Tensor:
    """Paths (N, D) of trees.paths as theirs: leaves only, padding last; sorted by node, where `last` stands for padding."""
    rows = found[(found >= 0).any(1)].tolist()
    if last is not None:
        rows = sorted(rows, key=lambda row: [last if node < 0 else node for node in row])
    return torch.tensor(rows)


def tree_structure(case: Case, check: Check) -> dict[str, Tensor]:
    parents, _ = trees.static_tree([[r for r in path if r >= 0] for path in check.inputs["choices"].tolist()])
    depth = trees.depths(parents)
    return {
        "mask": trees.ancestor_mask(parents),
        "depth": depth,
        "paths": in_rows(trees.paths(parents, int(depth.max())), last=len(parents)),
    }


def parents_of(paths: Tensor) -> Tensor:
    """paths (R, D), -1 padded -> parents (N,)."""
    pairs = torch.stack((paths[:, :-1], paths[:, 1:]), -1).flatten(0, 1)
    parent, child = pairs[(pairs >= 0).all(1)].unbind(1)
    return torch.full((int(paths.max()) + 1,), trees.ROOT).scatter(0, child, parent)


def verify(case: Case, check: Check) -> dict[str, Tensor]:
    given, params = check.inputs, check.params
    relaxed = relaxation(check) if params["lantern"] else None
    logits, tokens, paths = given["node_logits"], given["node_tokens"], given["paths"]
    if params["mode"] == "greedy":
        node, count, token = verify_tree_greedy(logits[None], tokens[None], paths[None], relaxed)
        return {"last_node": node, "num_accepted": count, "next_token": token}
    law = Filter(params["temperature"], params.get("top_k", 0), params.get("top_p", 1.0), convention="lantern")
    parents = parents_of(paths)
    u = given["uniforms"]

    def every(x: Tensor) -> Tensor:
        return x.expand(len(u), *x.shape)

    drawn = (every(given["draft_dist"]), every(given["cond_prob"])) if params["mode"] == "static" else None
    width = int(trees.sibling_ranks(parents).max()) + 1
    walk = verify_tree(
        every(law.probs(logits)),
        every(tokens),
        every(trees.children(parents, width)),
        paths.shape[1] - 1,
        u,
        drawn,
        relaxed,
    )
    return {"last_node": walk.node, "num_accepted": walk.count, "next_dist": walk.law}


ROOM = 256  # slots for the nodes of a tree: more than any case feeds


def drafter_of(case: Case) -> Drafter:
    return lantern_drafter_from_published(case.weights(), case.config).requires_grad_(False)


def hidden(case: Case, check: Check) -> dict[str, Tensor]:
    return {"hidden": drafter_of(case)(check.inputs["features"], check.inputs["tokens"])}


def loss(case: Case, check: Check) -> dict[str, Tensor]:
    given = check.inputs
    total, parts = drafter_of(case).loss(given["features"], given["tokens"], given["head_weight"])
    return {"loss": total[None], "vloss": parts["feature"][None], "ploss": parts["law"][None]}


def observed(case: Case, check: Check, drafter: Drafter) -> DrafterState:
    """What the drafter has seen after the features of this check, and of those before it that it continues."""
    if check.params.get("continues_previous"):
        number = next(i for i, other in enumerate(case.checks) if other is check)
        state = observed(case, case.checks[number - 1], drafter)
    else:
        state = drafter.begin(1, len(check.inputs["tokens"]), room=ROOM)
    features = check.inputs["features"]
    tokens = check.inputs["tokens"][:, 1:]  # theirs brings all tokens, also those seen
    drafter.observe(state, features, tokens[:, tokens.shape[1] - features.shape[1] :])
    return state


def draft_tree(case: Case, check: Check) -> dict[str, Tensor]:
    given, params, drafter = check.inputs, check.params, drafter_of(case)
    temperature = params.get("temperature", 0)
    keep = Filter(temperature or 1.0, params.get("top_k", 0), params.get("top_p", 1.0), convention="lantern")

    def read(x: Tensor) -> Tensor:
        logits = mix(*(x @ given["head_weight"].T), params["cfg_scale"])
        return (keep(logits) if temperature else logits).log_softmax(-1)

    first, expand = drafter.grow(observed(case, check, drafter), read)
    newest = given["tokens"][:1, -1:]
    if params["mode"] == "static":
        tree = trees.static_tree([[rank for rank in path if rank >= 0] for path in given["choices"].tolist()])
        tokens, _, _ = trees.fill_static_tree(first, expand, *tree)
        return {"tokens": torch.cat((newest, tokens[:, 1:]), dim=1)[0]}
    config = case.config
    tokens, parents = trees.dynamic_tree(first, expand, config["depth"], config["top_k"], config["total_tokens"])
    depth = trees.depths(parents)[0]
    return {
        "tokens": torch.cat((newest, tokens[:, 1:]), dim=1)[0],
        "parents": parents[0],
        "depth": depth,
        "paths": in_rows(trees.paths(parents[0], int(depth.max())), last=len(depth) if temperature else None),
    }


CALLS = {
    "hidden": hidden,
    "loss": loss,
    "draft_tree": draft_tree,
    "nearest_neighbors": neighbors,
    "lantern_relaxed_prob": relaxed_prob,
    "tree_structure": tree_structure,
    "lantern_verify_tree": verify,
}
