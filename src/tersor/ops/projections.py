"""The projections inside nn.MultiheadAttention, as linear layers over the same weights.

They have the names that `ops.attention.split_attention` gives them, so patterns fit both.
"""

from torch import Tensor, nn

_ATTRIBUTES = {
    "in_projection": "in_proj_weight",
    "in_projection_q": "q_proj_weight",
    "in_projection_k": "k_proj_weight",
    "in_projection_v": "v_proj_weight",
}
ATTRIBUTES = ("weight", *_ATTRIBUTES.values())
"""Where layers keep the weights that a mask may be for."""


def projections(net: nn.Module) -> dict[str, nn.Linear]:
    """Return a linear layer for each weight of attention that is not a layer of its own.

    Args:
        net: The network. The layers share its parameters; they are not part of it.

    Returns:
        `NAME.in_projection` of query, key and value in one; or `_q`, `_k` and `_v`, where keys or
        values have another width.
    """
    found = {}
    for name, module in net.named_modules(remove_duplicate=False):
        if not isinstance(module, nn.MultiheadAttention):
            continue
        for own, attribute in _ATTRIBUTES.items():
            weight = getattr(module, attribute)
            if weight is not None:
                found[f"{name}.{own}" if name else own] = _over(module, attribute, weight)
    return found


def _over(module: nn.MultiheadAttention, attribute: str, weight: Tensor) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    if attribute in module._parameters:
        assert isinstance(weight, nn.Parameter)
        made.weight = weight
    else:
        del made._parameters["weight"]
        made.weight = weight  # type: ignore[assignment]  # computed from others, not a parameter
    return made.train(module.training)


def owner(net: nn.Module, name: str) -> tuple[nn.Module, str] | None:
    """Tell which module holds the weight of the layer `name`, and under which attribute."""
    modules = dict(net.named_modules(remove_duplicate=False))
    if name in modules:
        return modules[name], "weight"
    parent, _, own = name.rpartition(".")
    module = modules.get(parent)
    if isinstance(module, nn.MultiheadAttention) and own in _ATTRIBUTES:
        return module, _ATTRIBUTES[own]
    return None


def layer(net: nn.Module, name: str) -> nn.Module:
    """Return the layer `name`, also where it is a projection inside attention.

    Raises:
        AttributeError: there is none.
    """
    found = projections(net).get(name)
    return net.get_submodule(name) if found is None else found
