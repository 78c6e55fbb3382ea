"""Draws docs/architecture.svg from the imports of the code: `python docs/draw_rooms.py`.

An arrow means "imports". Arrows that follow from others are left out (the transitive reduction),
and so are arrows to `FOUNDATION`, which most rooms import. Rows are the layers of
`[tool.importlinter]` in pyproject.toml. Needs the extra `dev`.
"""

import tomllib
from pathlib import Path

import grimp

ROOT = Path(__file__).parents[1]
SVG = ROOT / "docs" / "architecture.svg"

WIDTH, ROW_HEIGHT, BOX_WIDTH, BOX_HEIGHT = 1100, 80, 224, 52
ROOMS = {
    "cli": (0.5, "one file a command"),
    "train": (0.3, "an update, and the loop"),
    "tools": (0.8, "verify-resume"),
    "training": (0.3, "set-up, results, side jobs, stopping"),
    "weights": (0.62, "Hugging Face, GGUF, merging"),
    "inference": (0.3, "generation and evaluation"),
    "checkpoints": (0.18, "state, writing, reading"),
    "logs": (0.62, "rows, clocks, sinks, plot"),
    "distributed": (0.42, "processes, FSDP2, compilation"),
    "model": (0.16, "the LLaMA, and a reference"),
    "optim": (0.46, "AdamW, clipping, schedule, spikes"),
    "run_folder": (0.8, "files and lock of a run"),
    "data": (0.8, "documents to batches on the device"),
    "planning": (0.46, "FLOPs, memory, bounds"),
    "config": (0.46, "options, recipes, their rules"),
    "console": (0.8, "what training and prepare print"),
    "urls": (0.63, "files behind URLs, network failures"),
    "atomic": (0.65, "atomic file writes, locks"),
    "errors": (0.42, "failures that end a run"),
    "printable": (0.19, "text safe for a terminal"),
    "safetensors_file": (0.19, "tensors into a file, one by one"),
    "typed_json": (0.87, "typed reading of JSON"),
    "fastllama_kernels": (0.16, "one file an operator"),
}
"""The centre of each room as a fraction of the width, and its caption."""
FOUNDATION = ("config", "console", "atomic", "errors", "printable", "typed_json")
TOKEN_PATH = ("data", "train", "model", "fastllama_kernels", "optim", "logs", "checkpoints")
"""Rooms in the order in which a token, its loss and its weights pass through them."""


def layers() -> list[list[str]]:
    """Rooms by layer, from the top, as the import contract lists them."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    (contract,) = (each for each in contracts["contracts"] if each["type"] == "layers")
    rows = ([room.strip() for room in layer.split("|")] for layer in contract["layers"])
    return [
        [room.removeprefix("fastllama.") for room in row]
        for row in rows
        if "__main__" not in row[0]
    ]


def imports() -> set[tuple[str, str]]:
    """Every pair of rooms of which the first imports the second."""
    graph = grimp.build_graph("fastllama", "fastllama_kernels", cache_dir=None)
    found = set()
    for module in graph.modules:
        for imported in graph.find_modules_directly_imported_by(module):
            found.add((room_of(module), room_of(imported)))
    return {(a, b) for a, b in found if a != b and a in ROOMS and b in ROOMS}


def room_of(module: str) -> str:
    """The room of a module: its folder, or the file if it lies in `fastllama` itself."""
    parts = module.split(".")
    return parts[0] if parts[0] == "fastllama_kernels" else (*parts, "")[1]


def reduced(arrows: set[tuple[str, str]]) -> list[tuple[str, str]]:
    """The arrows that do not follow from others."""
    below: dict[str, set[str]] = {}
    for a, b in arrows:
        below.setdefault(a, set()).add(b)

    def reachable(room: str) -> set[str]:
        direct = below.get(room, set())
        return direct.union(*(reachable(other) for other in direct))

    return sorted(
        (a, b)
        for a, b in arrows
        if not any(b in reachable(other) for other in below[a] if other != b)
    )


def draw() -> str:
    """The picture as SVG."""
    rows = layers()
    place = {
        room: (ROOMS[room][0] * WIDTH, 40 + number * ROW_HEIGHT)
        for number, row in enumerate(rows)
        for room in row
    }
    height = 40 + len(rows) * ROW_HEIGHT
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        'font-family="Helvetica, Arial, sans-serif">',
        '<rect width="100%" height="100%" fill="#ffffff"/>',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        'markerHeight="7" orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="#8a94a6"/></marker>',
        "</defs>",
    ]
    lines += [arrow(place[a], place[b]) for a, b in reduced(imports()) if b not in FOUNDATION]
    for room, (x, y) in place.items():
        lines.append(box(room, x, y))
    return "\n".join([*lines, "</svg>", ""])


def arrow(start: tuple[float, float], end: tuple[float, float]) -> str:
    """A curve from the bottom of one box to the top of another, around the boxes between them."""
    (x, y), (to_x, to_y) = start, end
    y, to_y = y + BOX_HEIGHT, to_y - 2
    n_rows = round((to_y - y) / ROW_HEIGHT)
    # Straight down through several rows it would cross boxes: bend it outward.
    bend = 0.0 if n_rows < 1 or abs(to_x - x) > 60 else (-1 if x < WIDTH / 2 else 1) * 130
    middle = (y + to_y) / 2
    return (
        f'<path d="M{x:.0f} {y:.0f} C{x + bend:.0f} {middle:.0f} {to_x + bend:.0f} {middle:.0f} '
        f'{to_x:.0f} {to_y:.0f}" fill="none" stroke="#8a94a6" stroke-width="1.4" '
        'marker-end="url(#tip)"/>'
    )


def box(room: str, x: float, y: float) -> str:
    """A room: its name, its caption, and its place on the way of a token."""
    on_path = room in TOKEN_PATH
    fill, edge = ("#fff4e0", "#e08a00") if on_path else ("#f2f5fa", "#6c7a91")
    name = f"{room}/" if (ROOT / "fastllama" / room).is_dir() or "kernels" in room else f"{room}.py"
    left = x - BOX_WIDTH / 2
    parts = [
        f'<rect x="{left:.0f}" y="{y}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="7" '
        f'fill="{fill}" stroke="{edge}"/>',
        f'<text x="{x:.0f}" y="{y + 21}" text-anchor="middle" font-size="15" '
        f'font-weight="bold" fill="#1d2533">{name}</text>',
        f'<text x="{x:.0f}" y="{y + 39}" text-anchor="middle" font-size="11" '
        f'fill="#4a5568">{ROOMS[room][1]}</text>',
    ]
    if on_path:
        number = TOKEN_PATH.index(room) + 1
        parts += [
            f'<circle cx="{left:.0f}" cy="{y + 2}" r="11" fill="#e08a00"/>',
            f'<text x="{left:.0f}" y="{y + 6}" text-anchor="middle" font-size="12" '
            f'font-weight="bold" fill="#ffffff">{number}</text>',
        ]
    return "\n".join(parts)


if __name__ == "__main__":
    SVG.write_text(draw(), encoding="utf-8")
