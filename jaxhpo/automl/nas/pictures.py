"""An exported network as text, and as a matplotlib figure."""

from typing import TYPE_CHECKING, Any, NamedTuple

from flax import linen as nn

from jaxhpo.automl.nas.cells import EDGES
from jaxhpo.automl.nas.plain import Block, PlainCell, PlainCNN, PlainMLP
from jaxhpo.views.plots import axes, style
from jaxhpo.views.scales import BAD, FAINT, GOOD, INK, PAPER, WINNER

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {"skip_connect": WINNER, "nor_conv_1x1": GOOD, "nor_conv_3x3": GOOD, "avg_pool_3x3": BAD}


class _Step(NamedTuple):
    label: str
    width: int | None = None
    """units or channels, where it has parameters"""
    skip: bool = False


def describe(network: nn.Module) -> str:
    """An exported network in words: a line for each layer, or the operations of a cell as NAS-Bench-201 writes them.

    Args:
      network: what `export` returned.

    Raises:
      TypeError: `network` is another module.

    Example:
      >>> print(describe(PlainMLP(10, (Block(32, "relu"), Block(16, "tanh", skip=True)))))
      dense 32, relu
      dense 16, tanh, plus its input
      dense 10
    """
    if isinstance(network, PlainCell):
        return _cell_text(network)
    return "\n".join(step.label + ", plus its input" * step.skip for step in _steps(network))


def draw(network: nn.Module, ax: "Axes | None" = None) -> "Figure":
    """A picture of an exported network.

    Layers are boxes, as high as they have units or channels (in logarithms), skip connections are arcs above them. Of a
    network of cells it is the cell: its nodes, and the operations as arrows.

    Args:
      network: what `export` returned.
      ax: axes to draw on; a new figure if not given.

    Raises:
      TypeError: `network` is another module.
      ImportError: matplotlib is not installed.

    Example:
      >>> import io
      >>> draw(PlainMLP(10, (Block(32, "relu"), Block(16, "tanh", skip=True)))).savefig(io.BytesIO())
    """
    with style():
        if isinstance(network, PlainCell):
            return _draw_cell(network, axes(ax, 7.0, 4.0))
        steps = _steps(network)
        return _draw_chain(steps, axes(ax, 1.1 * (len(steps) + 1), 3.2))


def _steps(network: nn.Module) -> list[_Step]:
    if isinstance(network, PlainMLP):
        steps = [_step(block) for block in network.blocks]
    elif isinstance(network, PlainCNN):
        steps = [step for blocks in network.stages for step in (*map(_step, blocks), _Step("max-pool 2x2"))]
        steps.append(_Step("mean"))
    else:
        kinds = "a PlainMLP, PlainCNN or PlainCell, as export returns it"
        raise TypeError(f"network must be {kinds}, got {type(network).__name__}")
    return [*steps, _Step(f"dense {network.features}", network.features)]


def _step(block: Block) -> _Step:
    name = block.activation if isinstance(block.activation, str) else getattr(block.activation, "__name__", "function")
    kind = "dense" if block.kernel is None else f"conv {block.kernel}x{block.kernel},"
    return _Step(f"{kind} {block.width}, {name}", block.width, block.skip)


def _cell_text(network: PlainCell) -> str:
    nodes = []
    for node in (1, 2, 3):
        into = zip(network.operations, EDGES, strict=True)
        nodes.append("|" + "|".join(f"{operation}~{a}" for operation, (a, b) in into if b == node) + "|")
    channels = ", ".join(str(network.channels * 2**stage) for stage in range(network.stages))
    return f"{'+'.join(nodes)}\n{network.stages} stages of {network.cells} cells, channels {channels}"


def _draw_chain(steps: list[_Step], axis: Any) -> "Figure":
    from matplotlib.patches import FancyBboxPatch

    heights = [0.5 if step.width is None else 0.5 + 0.25 * step.width.bit_length() for step in steps]
    top = max(heights) / 2
    _arrow(axis, (-1.0, 0.0), (-0.36, 0.0), INK)
    for x, (step, height) in enumerate(zip(steps, heights, strict=True)):
        colour = BAD if step.width is None else GOOD
        box = FancyBboxPatch(
            (x - 0.3, -height / 2), 0.6, height, boxstyle="round,pad=0.02", facecolor=colour, edgecolor="none"
        )
        axis.add_patch(box)
        axis.text(x, -top - 0.15, step.label.replace(", ", "\n"), ha="center", va="top", fontsize=8)
        if x:
            _arrow(axis, (x - 0.66, 0.0), (x - 0.36, 0.0), INK)
        if step.skip:
            _arrow(axis, (x - 0.51, 0.0), (x + 0.49, 0.0), WINNER, bend=-height - 0.6)
    axis.set_xlim(-1.1, len(steps) - 0.3)
    axis.set_ylim(-top - 1.3, top + 0.7)
    axis.set_axis_off()
    return axis.get_figure()


def _draw_cell(network: PlainCell, axis: Any) -> "Figure":
    for operation, (source, target) in zip(network.operations, EDGES, strict=True):
        if operation == "none":
            continue
        bend = {1: 0.0, 2: 0.35, 3: 0.45}[target - source] * (-1 if (source, target) != (1, 3) else 1)
        colour = COLOURS[operation]
        _arrow(axis, (source + 0.14, 0.0), (target - 0.14, 0.0), colour, bend=bend * (target - source))
        height = -bend * (target - source) / 2
        label = operation.removeprefix("nor_").replace("_", " ")
        halo: Any = {"facecolor": PAPER, "edgecolor": "none", "pad": 1.0}
        axis.text((source + target) / 2, height, label, ha="center", va="center", fontsize=8, color=colour, bbox=halo)
    for node, name in enumerate(("input", "1", "2", "output")):
        circle: Any = {"boxstyle": "round,pad=0.4", "facecolor": PAPER, "edgecolor": FAINT if name in "12" else INK}
        axis.text(node, 0.0, name, ha="center", va="center", bbox=circle)
    axis.set_xlim(-0.4, 3.4)
    axis.set_ylim(-0.6, 0.9)
    axis.set_axis_off()
    return axis.get_figure()


def _arrow(axis: Any, start: tuple[float, float], end: tuple[float, float], colour: str, bend: float = 0.0) -> None:
    """An arrow, bent so that it rises `-bend` above (below) the line in data units at its control point."""
    from matplotlib.patches import FancyArrowPatch
    from matplotlib.path import Path

    shape: Any = {"arrowstyle": "-|>", "mutation_scale": 10, "color": colour, "linewidth": 1.4}
    if not bend:
        axis.add_patch(FancyArrowPatch(start, end, shrinkA=0, shrinkB=0, **shape))
        return
    peak = ((start[0] + end[0]) / 2, start[1] - bend)
    path = Path([start, peak, end], [Path.MOVETO, Path.CURVE3, Path.CURVE3])
    axis.add_patch(FancyArrowPatch(path=path, **shape))
