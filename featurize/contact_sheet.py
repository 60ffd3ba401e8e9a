"""Contact sheets: the first, middle and last frame of each episode and camera, with what was found, as PNG files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image as Pillow
from PIL import ImageDraw, ImageFont

from vla.featurize.check_pictures import EpisodeLook
from vla.featurize.image import Image
from vla.stores.errors import UsageError
from vla.stores.filesystem import explaining

EPISODES_A_PAGE = 12
WIDTH = 144
"""Pixels of one picture: three of them and a label fit a screen twice, and a face or a gripper is still seen."""

LABEL, GAP, FONT, LINE = 200, 6, 15, 22
GOOD, BAD, INK, PAPER = (34, 139, 60), (190, 30, 30), (20, 20, 20), (255, 255, 255)


class ContactSheet:
    """Writes `sheet_000.png`, `sheet_001.png`, … into a folder, a page at a time: one page is in memory."""

    def __init__(self, folder: Path) -> None:
        """Create the folder. Raises `UsageError` where it holds sheets, `MachineError` where it cannot be created."""
        self.folder, self.files = folder, list[Path]()
        self._rows: list[Pillow.Image] = []
        with explaining(folder):
            folder.mkdir(parents=True, exist_ok=True)
            if next(folder.glob("sheet_*.png"), None) is not None:
                raise UsageError(f"{folder} holds contact sheets", expected="a new folder", fix="--pictures NEW")

    def add(self, look: EpisodeLook) -> None:
        """Draw one episode."""
        self._rows.append(_row(look))
        if len(self._rows) == EPISODES_A_PAGE:
            self.flush()

    def flush(self) -> None:
        """Write what is drawn."""
        if not self._rows:
            return
        page = Pillow.new("RGB", (max(row.width for row in self._rows), sum(row.height for row in self._rows)), PAPER)
        top = 0
        for row in self._rows:
            page.paste(row, (0, top))
            top += row.height
        path = self.folder / f"sheet_{len(self.files):03d}.png"
        with explaining(path):
            page.save(path)
        self.files.append(path)
        self._rows = []


def _row(look: EpisodeLook) -> Pillow.Image:
    """Draw one episode: its id, then for each camera a badge above the three pictures."""
    samples = {camera: [_scaled(image) for image in seen.samples] for camera, seen in look.cameras.items()}
    tallest = max([picture.height for pictures in samples.values() for picture in pictures] + [2 * LINE])
    block = 3 * (WIDTH + GAP)
    row = Pillow.new("RGB", (LABEL + len(samples) * (block + GAP), LINE + tallest + 3 * GAP), PAPER)
    draw, font = ImageDraw.Draw(row), ImageFont.load_default(FONT)
    for line, text in enumerate((look.episode.id, *_outcome(look.episode.texts))):
        draw.text((GAP, GAP + line * LINE), _fitted(draw, text, font, LABEL - 2 * GAP), INK, font)
    for place, (camera, pictures) in enumerate(samples.items()):
        left = LABEL + place * (block + GAP)
        colour, text = _badge(look, camera)
        text = _fitted(draw, f"{camera}: {text}", font, block - 4 * GAP)
        right = left + round(draw.textlength(text, font)) + 2 * GAP
        draw.rounded_rectangle((left, GAP, right, GAP + LINE), 4, colour)
        draw.text((left + GAP, GAP + 2), text, PAPER, font)
        for number, picture in enumerate(pictures):
            row.paste(picture, (left + number * (WIDTH + GAP), LINE + 2 * GAP))
    draw.line((0, row.height - 1, row.width, row.height - 1), (210, 210, 210))
    return row


def _badge(look: EpisodeLook, camera: str) -> tuple[tuple[int, int, int], str]:
    """Return the colour and the text of the verdict on one camera."""
    found = [f"{name} {share:.0%}" for name, share in look.cameras[camera].found().items()]
    found += [f"same as {' '.join(set(pair) - {camera})}" for pair in sorted(look.same) if camera in pair]
    found += ["does not read"] if look.errors else []
    return (BAD, ", ".join(found)) if found else (GOOD, "ok")


def _outcome(texts: Mapping[str, str]) -> Sequence[str]:
    """Return what the source states of the episode's success."""
    return [f"success: {texts['success']}"] if "success" in texts else []


def _scaled(image: Image) -> Pillow.Image:
    picture = Pillow.fromarray(image)
    # A tall picture is bounded as well, so that one camera cannot blow up a page.
    return picture.resize(_within(picture.width, picture.height))


def _within(width: int, height: int) -> tuple[int, int]:
    scale = min(WIDTH / width, 2 * WIDTH / height)
    return max(round(width * scale), 1), max(round(height * scale), 1)


def _fitted(
    draw: ImageDraw.ImageDraw, text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int
) -> str:
    """Cut a text in the middle until it fits `width` pixels: ids differ at their ends."""
    kept = cut = "".join(letter if letter.isprintable() else "?" for letter in text)
    while draw.textlength(cut, font) > width and len(kept) > 2:
        kept = kept[: (len(kept) - 1) // 2] + kept[(len(kept) + 1) // 2 :]
        cut = f"{kept[: len(kept) // 2]}…{kept[len(kept) // 2 :]}"
    return cut
