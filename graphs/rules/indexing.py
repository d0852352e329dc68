"""Rules of gather and scatter, read off their dimension numbers.

Index batch dimensions are parallel. Window dimensions that span the operand pass through. An operand
dimension that is looked up is whole, except in a batched lookup (one index per batch element, as in
a loss that picks the label's logit), where each device answers for its part and the answers add up.
XLA gathers a table sharded on its looked-up dimension, so the rules do not offer it (read from
compiled TPU programs, ``tests/test_rules.py``).
"""

from __future__ import annotations

from graphs.rules.rule import WHOLE, FactorBuilder, OpRule, register_rule


@register_rule("gather")
def gather(params, ins, outs) -> OpRule:
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    operand, indices = ins[:2]
    result = outs[0]
    build = FactorBuilder()
    f_op, f_ix, f_out = [WHOLE] * len(operand), [WHOLE] * len(indices), [WHOLE] * len(result)
    offset = set(numbers.offset_dims)
    batch_out = [d for d in range(len(result)) if d not in offset]
    for i, d in enumerate(batch_out):  # the last index dimension holds the coordinates
        f_ix[i] = f_out[d] = build.new(result[d])
    batching = tuple(getattr(numbers, "operand_batching_dims", ()))
    for d, i in zip(batching, getattr(numbers, "start_indices_batching_dims", ())):
        f_op[d] = f_ix[i]
    gone = set(numbers.collapsed_slice_dims) | set(batching)
    window = [d for d in range(len(operand)) if d not in gone]
    for d, o in zip(window, sorted(offset)):
        if sizes[d] == operand[d] == result[o]:
            f_op[d] = f_out[o] = build.new(operand[d])
    reduced = {}
    for d in numbers.collapsed_slice_dims:
        if batching and d in numbers.start_index_map and operand[d] > 1:
            f_op[d] = build.new(operand[d])
            reduced[f_op[d]] = "sum"
    return OpRule(
        operands=(tuple(f_op), tuple(f_ix)),
        results=(tuple(f_out),),
        sizes=tuple(build.sizes),
        reduced=reduced,
        light=False,
    )


@register_rule("scatter-add", "scatter_add", "scatter-sub", "scatter_sub")
def scatter_add(params, ins, outs) -> OpRule:
    """Updates may be sharded along their batch: the partial results add up."""
    return _scatter(params, ins, adds=True)


@register_rule(
    "scatter", "scatter-mul", "scatter_mul", "scatter-min", "scatter_min", "scatter-max",
    "scatter_max",
)  # fmt: skip
def scatter(params, ins, outs) -> OpRule:
    """Without addition the updates of one position cannot be split over devices."""
    return _scatter(params, ins, adds=False)


def _scatter(params, ins, adds: bool) -> OpRule:
    numbers = params["dimension_numbers"]
    operand, indices, updates = ins[:3]
    build = FactorBuilder()
    f_op, f_ix, f_up = [WHOLE] * len(operand), [WHOLE] * len(indices), [WHOLE] * len(updates)
    window_up = tuple(numbers.update_window_dims)
    batching = tuple(getattr(numbers, "operand_batching_dims", ()))
    ix_batching = tuple(getattr(numbers, "scatter_indices_batching_dims", ()))
    gone = set(numbers.inserted_window_dims) | set(batching)
    window_op = [d for d in range(len(operand)) if d not in gone]
    for d, u in zip(window_op, window_up):
        if operand[d] == updates[u]:
            f_op[d] = f_up[u] = build.new(operand[d])
    batch_up = [u for u in range(len(updates)) if u not in set(window_up)]
    reduced = {}
    for i, u in enumerate(batch_up):
        if i in ix_batching:
            d = batching[ix_batching.index(i)]
            f_up[u] = f_ix[i] = f_op[d] = build.new(updates[u])
        elif adds:
            f_up[u] = f_ix[i] = build.new(updates[u])
            if f_up[u] != WHOLE:
                reduced[f_up[u]] = "sum"
    for d in numbers.inserted_window_dims:
        if batching:
            f_op[d] = build.new(operand[d])
    return OpRule(
        operands=(tuple(f_op), tuple(f_ix), tuple(f_up)),
        results=(tuple(f_op),),
        sizes=tuple(build.sizes),
        reduced=reduced,
        light=False,
    )
