"""A drift report as one self-contained page: no script, and nothing that only colour tells.

Pictures are drawn by matplotlib (the extra ``vera-tools[html]``) as SVG, which stands in the page itself.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from vera_tools.drifting.drift import DriftReport, Sample
from vera_tools.dtypes import FLOATS
from vera_tools.errors import UsageError
from vera_tools.pages import Made, document, text
from vera_tools.platforms.names import PLATFORMS
from vera_tools.platforms.streams import Environment, Stream

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Up to so many layers are named one by one in the picture.
NAMED_LAYERS = 24

_BLUE, _ORANGE = "#0072b2", "#d55e00"
#: What becomes the page's own colour of text, and what stays as it is because it stands on a light cell.
_INK, _ON_LIGHT = "#010203", "#1f2933"

_STYLE = """
thead th { white-space: nowrap; } tbody th { min-width: 160px; }
td.stream code { font-size: 11px; white-space: nowrap; padding: 2px 5px; border-radius: 4px; }
.fused { background: var(--blue-ground); border: 1px solid var(--blue); }
.separate { background: var(--red-ground); border: 1px dashed var(--red); }
.other { background: var(--plum-ground); border: 2px dotted var(--plum); }
.unknown { background: var(--paper); border: 3px double var(--red); }
.verdict { font-weight: 700; white-space: nowrap; }
.verdict.yes { color: var(--blue); } .verdict.no { color: var(--red); } .open { color: var(--soft); }
tr.forced th { font-weight: 400; font-style: italic; padding-left: 22px; }
figure { margin: 12px 0 0; overflow-x: auto; color: var(--ink); }
figure svg { max-width: 100%; min-width: 560px; height: auto; }
figcaption { color: var(--soft); font-size: 13px; }
.key span { display: inline-block; margin-right: 18px; }
@media print { @page { size: A4 landscape; } figure svg { min-width: 0; } tbody th { min-width: 0; }
  thead th, td.stream code, .verdict { white-space: normal; } }
"""


def require() -> None:
    """Check that the pictures can be drawn.

    Raises:
        UsageError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UsageError(
            "the HTML report needs matplotlib, which is not installed here",
            hint="pip install 'vera-tools[html]'",
        ) from error


def render(report: DriftReport, *, made: Made | None = None) -> str:
    """The page's text.

    Raises:
        UsageError: matplotlib is not installed.
    """
    require()
    parts = [*_head(report), _matrix(report), _differences(report), _effects(report), _comparison(report)]
    return document("vera-tools drift", "\n".join(part for part in parts if part), made=made, style=_STYLE)


def _head(report: DriftReport) -> Iterator[str]:
    target = report.target
    wanted = f"<code>{text(target.recipe.name)}</code>" if target.recipe else "the stored pair"
    subject = f" of <code>{text(target.checkpoint)}</code>" if target.checkpoint else ""
    assumed = " (assumed: nothing proves it)" if target.assumed else ""
    yield "<h1>Which projections does torch draw here?</h1>"
    yield f"<p>Each row is one process. Measured against the projections{subject}: {wanted}{assumed}.</p>"
    drifted = [row for row in report.environments if row.native and row.exact is not True]
    if drifted:
        say = f"✗ {len(drifted)} environment{'s do' if len(drifted) > 1 else ' does'} not get them bit for bit"
    else:
        say = "✓ every environment gets them bit for bit, as it runs by itself"
    yield f'<p class="banner {"no" if drifted else "yes"}">{say}</p>'


def _matrix(report: DriftReport) -> str:
    dtypes = [dtype for dtype in FLOATS if any(dtype in row.streams for row in report.environments)]
    head = "".join(f"<th>{dtype}</th>" for dtype in dtypes)
    rows = "\n".join(_matrix_row(row, dtypes) for row in report.environments)
    return f"""<section>
<h2>Environments and torch's default dtype at the draw</h2>
<p class="key"><span><code class="fused">fused</code> one rounding</span>
<span><code class="separate">separate</code> two roundings</span>
<span><code class="other">other</code> a device's own generator</span>
<span><code class="unknown">unknown</code> no known recipe</span></p>
<div class="scroll"><table>
<thead><tr><th>environment</th><th>verdict</th>{head}<th>a seed-only checkpoint gets</th></tr></thead>
<tbody>
{rows}
</tbody>
</table></div>
<p>Names stand without their leading <code>mt19937-</code>. Rows in italics force weaker CPU kernels with
ATEN_CPU_CAPABILITY. They inform; the others decide.</p>
</section>"""


def _matrix_row(row: Environment, dtypes: list[str]) -> str:
    cells = "".join(f'<td class="stream">{_stream(row.streams.get(dtype))}</td>' for dtype in dtypes)
    kind = "" if row.native else ' class="forced"'
    name = text(row.interpreter or "this interpreter")
    versions = f"torch {row.torch}, Python {row.python}, {row.machine}" if row.torch else row.error or ""
    platform = f"<small>{row.platform} ({PLATFORMS[row.platform]})</small>" if row.platform else ""
    kernels = row.kernels if row.torch or row.native else f"{row.cpu_capability} (forced)"
    return (
        f"<tr{kind}><th>{name}: {text(kernels)}<small>{text(versions)}</small>{platform}{_known(row)}</th>"
        f"<td>{_verdict(row)}</td>{cells}<td>{text(row.gets)}</td></tr>"
    )


def _stream(stream: Stream | None) -> str:
    if stream is None:
        return ""
    if stream.error:
        return f"<small>not drawn: {text(stream.error)}</small>"
    kind = stream.recipe.rounding if stream.recipe else "other" if stream.generator else "unknown"
    label = stream.label.removeprefix("mt19937-")
    also = "".join(f"<small>= {text(name.removeprefix('mt19937-'))}</small>" for name in stream.also_matches[:1])
    return f'<code class="{kind}" title="{text(stream.label)}">{text(label)}</code>{also}'


def _verdict(row: Environment) -> str:
    if row.exact:
        return '<span class="verdict yes">✓ exact</span>'
    if row.exact is None:
        return f'<span class="verdict open">? {row.status if row.status != "ok" else "not drawn"}</span>'
    return f'<span class="verdict no">{"✗ drift" if row.native else "≠ differs"}</span>'


def _known(row: Environment) -> str:
    if row.known is None:
        return ""
    entry = text(row.known["entry"])
    return f"<small>{'as' if row.known['agrees'] else 'NOT as'} in the atlas ({entry})</small>"


def _differences(report: DriftReport) -> str:
    samples = _distinct(report)
    if not samples:
        return "<section><h2>Where the values differ</h2><p>Nowhere: no environment drew other values.</p></section>"
    parts = [
        "<section><h2>Where and how much the values differ</h2>",
        "<p>Both projections against the wanted ones. An ulp is the distance to the next representable number; near "
        "zero one rounding is many ulps, though it is tiny.</p>",
        _figure(
            lambda figure: _draw_ulps(figure, samples),
            (10.4, 3.2 + 0.2 * len(samples)),
            "Histogram of the differences in ulps",
        ),
    ]
    for names, sample in samples:
        rows, columns = sample.corner.shape
        caption = f"The first {rows} rows and {columns} columns of {sample.tensor}. {names}"
        height = 1.2 + 0.18 * rows
        parts.append(_figure(functools.partial(_draw_corner, sample=sample), (10.4, height), caption, visible=True))
    return "\n".join([*parts, "</section>"])


def _distinct(report: DriftReport) -> list[tuple[str, Sample]]:
    """Each different set of values once, with the names of the environments that drew it."""
    found: dict[int, tuple[list[str], Sample]] = {}
    for number, sample in report.samples.items():
        found.setdefault(id(sample), ([], sample))[0].append(_short(report.environments[number]))
    return [(_joined(names), sample) for names, sample in found.values()]


def _effects(report: DriftReport) -> str:
    found: dict[str, tuple[list[str], Mapping[str, Any]]] = {}
    for row in report.environments:
        if row.effect is not None:
            found.setdefault(repr(row.effect), ([], row.effect))[0].append(_short(row))
    if not found:
        return ""
    effects = [(_joined(names), effect) for names, effect in found.values()]
    parts = [
        "<section><h2>What it does to the adapter</h2>",
        '<div class="scroll"><table><thead><tr><th>environment</th><th>elements that differ</th><th>worst layer</th>'
        "<th>its update changes by</th><th>logits change by at most</th></tr></thead><tbody>",
    ]
    for names, effect in effects:
        worst, logits = effect["worst"], effect["logits"]
        module, change = (
            (worst["module"], f"{worst['relative_change']:.1e}") if worst else ("every update is zero", "0")
        )
        if logits:
            words = (
                f"{logits['max_abs']:.1e} <small>of {logits['largest']:.2g}; first choice changed in "
                f"{logits['argmax_changed']} of {logits['positions']} positions</small>"
            )
        else:
            words = f"<small>not compared: {text(effect['logits_why_not'] or '')}</small>"
        parts.append(
            f"<tr><th>{text(names)}</th><td>{100 * effect['differing']:.1f} %</td>"
            f"<td><code>{text(module)}</code></td><td>{change}</td><td>{words}</td></tr>"
        )
    parts.append("</tbody></table></div>")
    layers = len(effects[0][1]["layers"])
    height = (1.2 + 0.32 * layers if layers <= NAMED_LAYERS else 3.4) + 0.2 * len(effects)
    if any(effect["worst"] for _, effect in effects):
        caption = "Relative change of each layer's weight update"
        parts.append(_figure(lambda figure: _draw_layers(figure, effects), (10.4, height), caption))
    return "\n".join([*parts, "</section>"])


def _comparison(report: DriftReport) -> str:
    comparison = report.comparison
    if comparison is None:
        return ""
    lines = []
    for dtype, groups in comparison.groups.items():
        for group in groups:
            stream = comparison.rows[group[0]][1].streams[dtype]
            who = "<br>".join(text(f"{comparison.rows[n][0]}: {comparison.rows[n][1].title}") for n in group)
            lines.append(f'<tr><td>{dtype}</td><td class="stream">{_stream(stream)}</td><td>{who}</td></tr>')
    state = f"{'✓' if comparison.agree else '✗'} {text(comparison.verdict)}"
    return (
        f'<section><h2>Against saved reports</h2><p class="banner {"yes" if comparison.agree else "no"}">{state}</p>'
        '<div class="scroll"><table><thead><tr><th>dtype</th><th>stream</th><th>drawn by</th></tr></thead><tbody>'
        + "\n".join(lines)
        + "</tbody></table></div></section>"
    )


def _draw_ulps(figure: Figure, samples: list[tuple[str, Sample]]) -> None:
    axes = figure.subplots()
    longest = max(len(sample.ulps) for _, sample in samples)
    width = 0.8 / len(samples)
    styles = ((_BLUE, ""), (_ORANGE, "///"), ("#009e73", "..."), ("#8d4a7d", "xxx"))
    for number, (names, sample) in enumerate(samples):
        colour, hatch = styles[number % len(styles)]
        places = [power + (number - (len(samples) - 1) / 2) * width for power in range(len(sample.ulps))]
        shares = [100 * count / sample.size for count in sample.ulps]
        axes.bar(places, shares, width, label=names, color=colour, hatch=hatch, edgecolor="white", linewidth=0.5)
    axes.set_yscale("log")
    axes.set_xticks(range(longest), [_power(power) for power in range(longest)], fontsize=8)
    axes.set_xlabel("how far apart, in ulps; each bar reaches to the next power of two")
    axes.set_ylabel("% of all elements")
    _legend(figure)


def _legend(figure: Figure) -> None:
    """Above the picture, where it covers nothing."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", frameon=False, fontsize=9, ncols=1)


def _draw_corner(figure: Figure, sample: Sample) -> None:
    corner = sample.corner
    axes = figure.subplots()
    limit = float(abs(corner).max()) or 1.0
    image = axes.imshow(corner, cmap="PuOr", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
    for (row, column), value in _cells(corner):
        dark = abs(value) > 0.6 * limit
        sign = "+" if value > 0 else "−"
        axes.text(column, row, sign, ha="center", va="center", fontsize=7, color="white" if dark else _ON_LIGHT)
    axes.set_xlabel("column")
    axes.set_ylabel("row")
    bar = figure.colorbar(image, ax=axes, pad=0.015, fraction=0.03)
    bar.set_label("difference, in float32\nspacings at the bound", fontsize=8)
    bar.ax.tick_params(labelsize=8)


def _cells(corner: Any) -> Iterator[tuple[tuple[int, int], float]]:
    for row in range(corner.shape[0]):
        for column in range(corner.shape[1]):
            if corner[row, column]:
                yield (row, column), float(corner[row, column])


def _draw_layers(figure: Figure, effects: list[tuple[str, Mapping[str, Any]]]) -> None:
    axes = figure.subplots()
    names = [layer["module"] for layer in effects[0][1]["layers"]]
    markers = ("o", "s", "^", "D", "v", "P")
    colours = (_BLUE, _ORANGE, "#009e73", "#8d4a7d")
    named = len(names) <= NAMED_LAYERS
    positive = []
    for number, (label, effect) in enumerate(effects):
        changes = [layer["relative_change"] for layer in effect["layers"]]
        known = [(place, change) for place, change in enumerate(changes) if change is not None]
        beside = (number - (len(effects) - 1) / 2) * 0.18 if named else 0.0  # so that equal ones do not hide each other
        places, values = [place + beside for place, _ in known], [change for _, change in known]
        positive += [value for value in values if value > 0]
        x, y = (values, places) if named else (places, values)
        axes.plot(
            x, y, markers[number % 6], color=colours[number % 4], label=label, markersize=6, fillstyle="none", mew=1.6
        )
    if positive and max(positive) > 20 * min(positive):  # else all but the largest lie on the axis
        (axes.set_xscale if named else axes.set_yscale)("symlog", linthresh=min(positive))
    title = "how much of the layer's weight update changes (Frobenius norm, relative)"
    if named:
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xlabel(title)
        axes.set_xlim(left=0)
    else:
        axes.set_xlabel("layer, in the checkpoint's order")
        axes.set_ylabel(title.replace("(", "\n("), fontsize=8)
        axes.set_ylim(bottom=0)
    axes.grid(alpha=0.35, linewidth=0.6)
    _legend(figure)


def _figure(draw: Callable[[Figure], None], size: tuple[float, float], caption: str, *, visible: bool = False) -> str:
    """One picture as an SVG element; `caption` is its text for those who cannot see it."""
    import matplotlib
    from matplotlib.figure import Figure

    # Text stays text, and the same report gives the same bytes.
    inks = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": "vera-tools", "font.size": 10, **dict.fromkeys(inks, _INK)}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        for axes in figure.axes:
            axes.spines[["top", "right"]].set_visible(False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    svg = buffer.getvalue().replace(_INK, "currentColor")  # dark on paper, light in the dark
    svg = svg[svg.index("<svg") :].replace("<svg ", f'<svg role="img" aria-label="{text(caption)}" ', 1)
    return f"<figure>\n{svg}{f'<figcaption>{text(caption)}</figcaption>' if visible else ''}\n</figure>"


def _short(row: Environment) -> str:
    name = row.interpreter or "this interpreter"
    return f"{name}: torch {row.torch}, {row.kernels}"


def _joined(names: list[str]) -> str:
    return "; ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _power(power: int) -> str:
    return f"{2**power}" if power < 10 else f"{2 ** (power - 10)}k" if power < 20 else f"{2 ** (power - 20)}M"
