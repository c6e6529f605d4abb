"""Write the drawings of docs/concepts.md: `python docs/site/drawings.py`.

SVG by hand, so that they stay small and sharp and need no network. Colours follow what the page that shows them
prefers, light or dark; the ground is opaque, so that they can be read where that is not known.
"""

from __future__ import annotations

from pathlib import Path
from xml.sax.saxutils import escape

IMAGES = Path(__file__).parents[1] / "images"

STYLE = """
text { font: 13px system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; fill: #20242c }
.title { font-weight: 600 } .small { font-size: 11.5px } .soft { fill: #59616e } .middle { text-anchor: middle }
.ground { fill: #ffffff } .box { stroke-width: 1.2; rx: 5 }
.device { fill: #dce8fb; stroke: #4a7fd4 } .host { fill: #dcf1df; stroke: #43924f }
.disk { fill: #fcebc8; stroke: #bf8416 } .plain { fill: #f1f3f6; stroke: #9aa3b0 }
.part { fill: #ffffff; stroke: #9aa3b0 } .wait { fill: #f8cfcf; stroke: #c94a4a }
.line { stroke: #59616e; stroke-width: 1.4; fill: none; marker-end: url(#head) } .head { fill: #59616e }
@media (prefers-color-scheme: dark) {
  text { fill: #e7eaf0 } .soft { fill: #a8b0bd } .ground { fill: #1e2129 }
  .device { fill: #22375c; stroke: #6f9de8 } .host { fill: #1f4428; stroke: #62b870 }
  .disk { fill: #533e12; stroke: #dba43c } .plain { fill: #2b303b; stroke: #78818f }
  .part { fill: #1e2129; stroke: #78818f } .wait { fill: #5a2323; stroke: #e07070 }
  .line { stroke: #a8b0bd } .head { fill: #a8b0bd }
}
"""

MARKER = (
    '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    '<path class="head" d="M0 0 L8 4 L0 8 z"/></marker>'
)

CHUNK_MOVES = {
    ("at home", "fetching"): "fetch, mostly ahead",
    ("at home", "ready"): "at home in compute memory: used in place",
    ("at home", "updating"): "optimizer",
    ("fetching", "ready"): "complete",
    ("fetching", "at home"): "failed",
    ("ready", "held"): "access",
    ("held", "ready"): "release",
    ("ready", "at home"): "evict: free, the home is true",
    ("ready", "updating"): "optimizer",
    ("updating", "ready"): "done, it stays",
    ("updating", "at home"): "done",
}
"""What a chunk can do, as `gemini.chunk.state` has it; closing, which ends every state, is left out."""


class Drawing:
    """An SVG that grows shape by shape; coordinates are pixels from the upper left corner.

    Args:
        width: of the whole.
        height: of the whole.
        title: for those who cannot see it.
    """

    def __init__(self, width: int, height: int, title: str) -> None:
        self._size = (width, height)
        self._parts = [f"<title>{escape(title)}</title>", f"<style>{STYLE}</style>", f"<defs>{MARKER}</defs>"]
        self._parts.append(f'<rect class="ground" width="{width}" height="{height}" rx="6"/>')

    def box(self, x: float, y: float, width: float, height: float, kind: str, *lines: str) -> None:
        """Draw a box of a kind (a class of the style) with lines of text in its middle."""
        self._parts.append(f'<rect class="box {kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"/>')
        top = y + height / 2 + 4.5 - 8 * (len(lines) - 1)
        for number, line in enumerate(lines):
            self.text(x + width / 2, top + 16 * number, line, "middle" if number == 0 else "middle small soft")

    def text(self, x: float, y: float, text: str, kind: str = "") -> None:
        """Write a line."""
        self._parts.append(f'<text class="{kind}" x="{x:g}" y="{y:g}">{escape(text)}</text>')

    def arrow(self, *points: tuple[float, float]) -> None:
        """Draw an arrow through points."""
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        self._parts.append(f'<polyline class="line" points="{path}"/>')

    def svg(self) -> str:
        """Return the file's text."""
        width, height = self._size
        head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" role="img">'
        return "\n".join([head, *self._parts, "</svg>", ""])


def draw_parameter() -> Drawing:
    """What is kept of one parameter, bit by bit."""
    drawing = Drawing(
        760, 150, "The twelve bytes of a bfloat16 parameter: working weight, residual, momentum, variance"
    )
    bits = 7.0
    fields = (
        (16, "device", "working weight", "2 bytes, bfloat16"),
        (16, "plain", "residual", "2 bytes"),
        (32, "host", "momentum", "4 bytes, float32"),
        (32, "host", "variance", "4 bytes, float32"),
    )
    left = x = 44.0
    drawing.text(x, 28, "float32 master, in two halves", "title")
    drawing.text(x + 32 * bits, 28, "Adam's moments", "title")
    for num_bits, kind, name, amount in fields:
        drawing.box(x, 42, num_bits * bits, 50, kind, name, amount)
        x += num_bits * bits
    drawing.text(left, 116, "read by forward", "small soft")
    drawing.text(left, 131, "and backward", "small soft")
    drawing.text(
        left + 16 * bits + 8, 116, "these three are the state: read and written by the update alone", "small soft"
    )
    drawing.text(left + 16 * bits + 8, 131, "weights and state may live in different tiers, tile by tile", "small soft")
    return drawing


def draw_tiers() -> Drawing:
    """What lives in which tier, and what crosses between them in a step."""
    drawing = Drawing(760, 400, "Three tiers of memory, what is in each, and what moves between them in a step")
    bands = (
        (20, "device", "DEVICE", ("resident chunks", "slots", "gradient slots", "activations")),
        (150, "host", "HOST", ("weights at home", "state at home", "gradients", "ring, fetch slots")),
        (280, "disk", "NVME", ("weights at home", "state at home", "gradients", "spare places")),
    )
    for y, kind, name, parts in bands:
        drawing.box(20, y, 720, 72, kind)
        drawing.text(34, y + 41, name, "title")
        for number, part in enumerate(parts):
            drawing.box(110 + 155 * number, y + 16, 145, 40, "part", part)
    for y in (92, 222):
        drawing.arrow((182, y + 58), (182, y))
        drawing.text(192, y + 34, "weights: forward, backward", "small soft")
        drawing.arrow((492, y), (492, y + 58))
        drawing.text(502, y + 34, "gradients: once a pass", "small soft")
    drawing.arrow((372, 280), (372, 222))
    drawing.arrow((388, 222), (388, 280))
    drawing.text(398, 256, "state: update", "small soft")
    drawing.text(
        20,
        376,
        "Without a GPU the upper tier is missing: host memory computes, its slots hold what the disk",
        "small soft",
    )
    drawing.text(20, 391, "has lent, and a chunk that lives in host memory is used where it is.", "small soft")
    return drawing


def draw_step() -> Drawing:
    """A step of four units with three slots, lane by lane."""
    drawing = Drawing(760, 300, "One step in lanes: compute, three slots, gradients, updates")
    left, unit = 96.0, 41.5

    def bar(row: int, begin: float, end: float, kind: str, label: str) -> None:
        drawing.box(left + begin * unit + 1, 40 + 36 * row, (end - begin) * unit - 2, 26, kind, label)

    for row, name in enumerate(("compute", "slot A", "slot B", "slot C", "gradients", "updates")):
        drawing.text(16, 58 + 36 * row, name)
    for begin, end, text in ((0, 4, "forward"), (4, 12, "backward"), (12.9, 15.9, "next forward")):
        drawing.text(left + (begin + end) / 2 * unit, 26, text, "middle title")
    for begin, end, name in (
        (0, 1, "1"), (1, 2, "2"), (2, 3, "3"), (3, 4, "4"), (4, 6, "4"), (6, 8, "3"), (8, 10, "2"), (10, 12, "1"),
        (12.9, 13.9, "1"), (13.9, 14.9, "2"), (14.9, 15.9, "3"),
    ):  # fmt: skip
        bar(0, begin, end, "device", name)
    bar(0, 12, 12.9, "wait", "wait")
    for row, begin, end, kind, name in (
        (1, 0, 1, "device", "1"), (1, 1, 3, "plain", "fetch 4"), (1, 3, 6, "device", "4"),
        (1, 6, 8, "plain", "fetch 1"), (1, 8, 13.9, "device", "1"), (1, 14.4, 15.9, "plain", "fetch 4"),
        (2, 0, 15.9, "device", "2"),
        (3, 0, 2, "plain", "fetch 3"), (3, 2, 15.9, "device", "3"),
    ):  # fmt: skip
        bar(row, begin, end, kind, name)
    for begin, name in ((6, "4 home"), (8, "3 home"), (10, "2 home"), (12, "1")):
        bar(4, begin, begin + (1.4 if begin < 12 else 0.4), "disk", name)
    for number in range(4):
        bar(5, 12.4 + 0.5 * number, 12.9 + 0.5 * number, "host", f"{number + 1}")
    drawing.text(
        16,
        280,
        "Unit 1 is used last in backward and first in forward: its update is the one that compute waits for.",
        "small soft",
    )
    return drawing


def draw_chunk_life() -> Drawing:
    """The states of a chunk's working weights."""
    drawing = Drawing(760, 330, "The states of a chunk: at home, fetching, ready, held, updating")
    places = {
        "at home": (30, 130),
        "fetching": (225, 40),
        "ready": (425, 130),
        "held": (625, 130),
        "updating": (225, 240),
    }
    for name, (x, y) in places.items():
        drawing.box(x, y, 105, 46, {"held": "wait", "updating": "host", "ready": "device"}.get(name, "plain"), name)
    arrows = {
        ("at home", "fetching"): ((60, 130), (60, 55), (225, 55)),
        ("fetching", "at home"): ((225, 75), (100, 75), (100, 130)),
        ("fetching", "ready"): ((330, 63), (455, 63), (455, 130)),
        ("at home", "ready"): ((135, 143), (425, 143)),
        ("ready", "at home"): ((425, 163), (135, 163)),
        ("ready", "held"): ((530, 143), (625, 143)),
        ("held", "ready"): ((625, 163), (530, 163)),
        ("ready", "updating"): ((505, 176), (505, 275), (330, 275)),
        ("updating", "ready"): ((330, 253), (455, 253), (455, 176)),
        ("at home", "updating"): ((60, 176), (60, 275), (225, 275)),
        ("updating", "at home"): ((225, 253), (105, 253), (105, 176)),
    }
    labels = {
        ("at home", "fetching"): (66, 48), ("fetching", "at home"): (108, 91), ("fetching", "ready"): (340, 56),
        ("at home", "ready"): (148, 137), ("ready", "at home"): (148, 179), ("ready", "held"): (540, 137),
        ("held", "ready"): (540, 179), ("ready", "updating"): (345, 291), ("updating", "ready"): (340, 246),
        ("at home", "updating"): (66, 291), ("updating", "at home"): (113, 246),
    }  # fmt: skip
    for move, points in arrows.items():
        drawing.arrow(*points)
        drawing.text(*labels[move], CHUNK_MOVES[move], "small soft")
    drawing.text(
        16,
        318,
        "Only a held chunk is computed with, and it cannot move. Closing the engine ends every state.",
        "small soft",
    )
    return drawing


def draw_sharding() -> Drawing:
    """One chunk shared by three ranks in stage 3."""
    drawing = Drawing(760, 330, "A chunk of three shards on three ranks: gathered for use, exchanged as gradients")
    drawing.text(16, 80, "compute")
    drawing.text(16, 97, "memory")
    drawing.text(16, 225, "home")
    for rank in range(3):
        x = 96 + 222 * rank
        drawing.text(x + 100, 28, f"rank {rank}", "middle title")
        drawing.box(x, 46, 200, 86, "device")
        drawing.text(x + 100, 66, "chunk, in a slot", "middle small soft")
        for shard in range(3):
            drawing.box(x + 14 + 58 * shard, 78, 56, 40, "part", f"{shard}")
        drawing.box(x, 190, 200, 86, "host")
        drawing.box(x + 12, 202, 84, 62, "part", f"{rank}", "weights,", "state")
        drawing.box(x + 104, 202, 84, 62, "part", f"{rank}", "mean of", "gradients")
        drawing.arrow((x + 54, 190), (x + 54, 132))
        drawing.text(x + 60, 166, "gather", "small soft")
        drawing.arrow((x + 146, 132), (x + 146, 190))
        drawing.text(x + 152, 166, "exchange", "small soft")
    drawing.text(
        16,
        304,
        "Gather: each rank gives its shard to all. Exchange: each gives every other its part of a gradient, adds up",
        "small soft",
    )
    drawing.text(
        16,
        319,
        "what it was given, in the order of ranks. Homes, state and update are those of one rank with a smaller chunk.",
        "small soft",
    )
    return drawing


DRAWINGS = {
    "parameter.svg": draw_parameter,
    "tiers.svg": draw_tiers,
    "step.svg": draw_step,
    "chunk_life.svg": draw_chunk_life,
    "sharding.svg": draw_sharding,
}


def main() -> None:
    """Write all drawings."""
    for name, draw in DRAWINGS.items():
        (IMAGES / name).write_text(draw().svg(), encoding="utf-8")


if __name__ == "__main__":
    main()
