"""A matrix over pairs of agents as a picture, for tools that take no others."""

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw

# ColorBrewer's red-white-blue, safe for colour blindness: red for conflict.
_STOPS = np.array(
    [(178, 24, 43), (240, 138, 108), (247, 247, 247), (106, 174, 214), (33, 102, 172)], dtype=float
)
_UNDEFINED = (169, 176, 184)
_INK, _PAPER = (40, 48, 56), (255, 255, 255)
_SIZE = 320  # about as much as TensorBoard shows without being asked
_MARGIN = 20


def heatmap(
    values: Float[np.ndarray, "agent agent_other"],
) -> UInt8[np.ndarray, "height width channel"]:
    """Draw a matrix.

    Args:
        values: Numbers from -1 (red) over 0 (white) to 1 (blue); NaN is grey.

    Returns:
        RGB, with the agents' numbers at the rows and columns if there is room.
    """
    agents = len(values)
    cell = max(1, _SIZE // agents)
    places = (np.clip(values, -1, 1) + 1) / 2 * (len(_STOPS) - 1)
    colours = np.stack(
        [np.interp(places, range(len(_STOPS)), channel) for channel in _STOPS.T], axis=-1
    )
    colours[np.isnan(values)] = _UNDEFINED
    drawn = colours.round().astype(np.uint8).repeat(cell, axis=0).repeat(cell, axis=1)
    side = _MARGIN + len(drawn)
    picture = Image.new("RGB", (side, side), _PAPER)
    picture.paste(Image.fromarray(drawn), (_MARGIN, _MARGIN))
    pen = ImageDraw.Draw(picture)
    if cell >= _MARGIN:
        for agent in range(agents):
            middle = _MARGIN + (agent + 0.5) * cell
            pen.text((middle, _MARGIN / 2), str(agent), fill=_INK, anchor="mm")
            pen.text((_MARGIN / 2, middle), str(agent), fill=_INK, anchor="mm")
    return np.asarray(picture)
