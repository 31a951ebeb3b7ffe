"""A comparison of two checkpoints as one page: how much each layer's weight update changed, and what else differs."""

from __future__ import annotations

import json
from typing import Any

from vera_tools.comparing.diff import DiffReport, LayerDifference, TensorDifference
from vera_tools.pages import Made, document, text

_STYLE = """
.bar { display: block; height: 10px; min-width: 1px; background: var(--blue); border-radius: 2px; }
td.bar-cell { width: 40%; min-width: 110px; vertical-align: middle; }
tbody th { overflow-wrap: anywhere; font-size: 12px; }
@media print { .bar { border: 5px solid var(--blue); height: 0; } }
"""


def render(report: DiffReport, *, made: Made | None = None) -> str:
    """The page's text."""
    if report.equal:
        say, good = "✓ config and tensors are equal", True
    elif report.equal_in_effect:
        say, good = "≈ not equal, but both do exactly the same to a base", True
    else:
        say, good = "✗ not equal", False
    parts = [
        "<h1>What changed between two adapters?</h1>",
        f"<p>A: <code>{text(report.a)}</code><br>B: <code>{text(report.b)}</code></p>",
        f'<p class="banner {"yes" if good else "no"}">{say}</p>',
        _effect(report),
        _config(report),
        _tensors(report),
        _beside(report),
    ]
    return document("vera-tools diff", "\n".join(filter(None, parts)), made=made, style=_STYLE)


def _effect(report: DiffReport) -> str:
    head = "<section><h2>The change of each layer's weight update</h2>"
    if report.layers is None:
        return f"{head}<p>Not known: {text(report.why_not or '')}</p></section>"
    total = report.relative_norm
    if total is None:
        words = "A changes no weight, and B does."
    elif total == 0:
        words = "None: both make exactly the same updates to a base's weights."
    else:
        words = f"All layers together: {total:.3g} of A's update (Frobenius norm)."
    doubt = f"<p>Not certain: {text(report.why_not)}</p>" if report.why_not else ""
    largest = max((layer.relative_norm or 0.0 for layer in report.layers), default=0.0)
    rows = "\n".join(_layer(layer, largest) for layer in report.layers)
    scale = f"<p>The longest bar is {largest:.3g}; the layers stand in the checkpoint's order.</p>" if largest else ""
    return (
        f'{head}<p>{words}</p>{doubt}{scale}<div class="scroll"><table><thead><tr><th>layer</th>'
        '<th class="number">change, relative to A</th><th></th><th class="number">norm of A</th>'
        f'<th class="number">norm of B</th></tr></thead><tbody>\n{rows}\n</tbody></table></div></section>'
    )


def _layer(layer: LayerDifference, largest: float) -> str:
    relative, norms = layer.relative_norm, layer.norms
    share = 100 * (relative or 0.0) / largest if largest else 0.0
    figure = "only B has one" if relative is None else "0" if relative == 0 else f"{relative:.3g}"
    bar = f'<span class="bar" style="width: {share:.1f}%"></span>' if share else ""
    sizes = [f"{norms.a:.3g}", f"{norms.b:.3g}"] if norms else ["", ""]
    return (
        f'<tr><th>{text(layer.module)}</th><td class="number">{figure}</td><td class="bar-cell">{bar}</td>'
        + "".join(f'<td class="number">{size}</td>' for size in sizes)
        + "</tr>"
    )


def _config(report: DiffReport) -> str:
    lines = [(key, _value(one), _value(two)) for key, one, two in report.config]
    lines += [(key, "set", "not set") for key in report.config_only[0]]
    lines += [(key, "not set", "set") for key in report.config_only[1]]
    return _table("Config", ("key", "A", "B"), lines, nothing="Both have the same values.")


def _tensors(report: DiffReport) -> str:
    lines = [_tensor(tensor) for tensor in report.tensors]
    lines += [
        (name, f"only in {side}") for side, names in zip("AB", report.tensors_only, strict=True) for name in names
    ]
    equal = f"{report.equal_tensors:,} tensors are the same bit for bit."
    return _table("Tensors", ("tensor", "how it differs"), lines, nothing=equal, above=equal)


def _tensor(tensor: TensorDifference) -> tuple[str, ...]:
    (one, two), (first, second) = tensor.shapes, tensor.dtypes
    said = [f"shape {list(one)} to {list(two)}"] if one != two else []
    said += [f"{first} to {second}"] if first != second else []
    said += [f"{tensor.differing:.2%} of the elements"] if tensor.differing is not None else []
    said += [f"at most {tensor.max_abs:.3g}"] if tensor.max_abs is not None else []
    said += [f"{tensor.max_ulp} ulp"] if tensor.max_ulp is not None else []
    said += [f"cosine {tensor.cosine:.6f}"] if tensor.cosine is not None else []
    return tensor.name, ", ".join(said)


def _beside(report: DiffReport) -> str:
    lines = [(name, state.replace(" a", " A").replace(" b", " B")) for name, state in report.beside.items()]
    return _table("Not compared", ("what", "state"), [line for line in lines if line[1] not in ("equal", "absent")])


def _table(
    title: str, columns: tuple[str, ...], lines: list[Any], *, nothing: str = "", above: str | None = None
) -> str:
    if not lines:
        return f"<section><h2>{title}</h2><p>{nothing}</p></section>" if nothing else ""
    head = "".join(f"<th>{column}</th>" for column in columns)
    return (
        f"<section><h2>{title}</h2>{f'<p>{above}</p>' if above else ''}"
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>\n'
        + "\n".join(_cells(line) for line in lines)
        + "\n</tbody></table></div></section>"
    )


def _cells(line: tuple[str, ...]) -> str:
    first, *others = line
    return f"<tr><th>{text(first)}</th>" + "".join(f"<td>{text(cell)}</td>" for cell in others) + "</tr>"


def _value(value: Any) -> str:
    shown = json.dumps(value)
    return shown if len(shown) <= 200 else shown[:197] + "..."
