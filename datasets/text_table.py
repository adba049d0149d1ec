"""Plain-text tables for the terminal."""

from collections.abc import Sequence


def text_table(
    rows: Sequence[Sequence[object]], header: Sequence[object] = (), align: str = "<", indent: str = ""
) -> str:
    """Lines of aligned columns, two spaces apart.

    align: `<` or `>` for every column from the left; its last letter also holds for all columns after it.
    """
    cells = [[str(cell) for cell in row] for row in ([header, *rows] if header else rows)]
    if not cells:
        return ""
    align += align[-1] * len(cells[0])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ("  ".join(f"{c:{a}{w}}" for c, a, w in zip(row, align, widths, strict=False)) for row in cells)
    return "\n".join((indent + line).rstrip() for line in lines)
