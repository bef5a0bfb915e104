"""An episode as a film: GIF by Pillow, MP4 where imageio-ffmpeg is installed."""

import importlib.util
from pathlib import Path

import numpy as np
from PIL import Image

from gradlab.checks import UsageError, check
from trainers.envs.vector_env import RenderingFailed, VectorEnv

FRAMES_PER_SECOND = 20


class Animation:
    """Draws the first copy of an environment whenever it is shown it.

    What is missing on this machine ends the drawing but not what is drawn; `write` tells of it.
    """

    def __init__(self, file: Path) -> None:
        """Draw nothing yet.

        Args:
            file: Where to write; its suffix, .gif or .mp4, says what.

        Raises:
            UsageError: If such a file can't be written.
        """
        suffix = file.suffix.lower()
        check(suffix in {".gif", ".mp4"}, "animate", "end in .gif or .mp4", str(file))
        if not file.absolute().parent.is_dir():
            raise UsageError(f"{file} can't be written: {file.parent} is not a folder.")
        if suffix == ".mp4" and importlib.util.find_spec("imageio_ffmpeg") is None:
            raise UsageError(
                f"{file} can't be written without imageio-ffmpeg. Install it (pip install "
                "imageio-ffmpeg), or choose a name that ends in .gif."
            )
        self._file = file
        self._frames: list[Image.Image] = []
        self._failure: RenderingFailed | None = None

    def __call__(self, env: VectorEnv) -> None:
        """Draw a frame.

        Args:
            env: The environment.

        Raises:
            UsageError: If there is no drawing of it.
        """
        if self._failure is not None:
            return
        try:
            frame = Image.fromarray(env.render(0))
        except RenderingFailed as failure:
            self._failure = failure
        else:
            # 256 colours are more than the drawings have, in a third of the memory.
            self._frames.append(frame.quantize(dither=Image.Dither.NONE))

    def write(self) -> int:
        """Write the file.

        Returns:
            The number of frames.

        Raises:
            RenderingFailed: If something is missing on this machine to draw.
            UsageError: If the file can't be written.
        """
        if self._failure is not None:
            raise self._failure
        try:
            if self._file.suffix.lower() == ".mp4":
                self._write_mp4()
            else:
                first, *others = self._frames
                milliseconds = 1000 // FRAMES_PER_SECOND
                first.save(
                    self._file, save_all=True, append_images=others, duration=milliseconds, loop=0
                )
        except OSError as error:
            raise UsageError(f"{self._file} can't be written: {error.strerror or error}.") from None
        return len(self._frames)

    def _write_mp4(self) -> None:
        import imageio_ffmpeg

        film = imageio_ffmpeg.write_frames(
            str(self._file), self._frames[0].size, fps=FRAMES_PER_SECOND, macro_block_size=2
        )
        film.send(None)
        for frame in self._frames:
            film.send(np.ascontiguousarray(frame.convert("RGB")))
        film.close()
