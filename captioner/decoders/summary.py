"""A decoder's layers, shapes and parameter counts, as text."""

from torch import nn


def summarize(decoder: nn.Module) -> str:
    """A line per parameter with shape and count, a subtotal per part, and the total, in which tied ones count once."""
    rows = [("parameter", "shape", "count")]
    for name, part in decoder.named_children():
        tensors = list(part.named_parameters())
        if not tensors:
            continue
        rows.append((name, type(part).__name__, f"{sum(one.numel() for _, one in tensors):,}"))
        rows += [(f"  {key}", _shape(one), f"{one.numel():,}") for key, one in tensors]
    direct = list(decoder.named_parameters(recurse=False))
    rows += [(name, _shape(one), f"{one.numel():,}") for name, one in direct]
    total = sum(parameter.numel() for parameter in decoder.parameters())
    rows.append(("total", type(decoder).__name__, f"{total:,}"))
    wide = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        f"{name:<{wide[0]}}  {shape:<{wide[1]}}  {count:>{wide[2]}}" for name, shape, count in rows
    )


def _shape(parameter: nn.Parameter) -> str:
    return " x ".join(map(str, parameter.shape))
