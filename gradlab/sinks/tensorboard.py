"""TensorBoard: event files with numbers and pictures, and files of its embedding projector."""

import io
import json
import os
import socket
import time
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from PIL import Image

from gradlab.extras import require
from gradlab.sinks.sink import About
from gradlab.sinks.tool import Tool

_CONFIG = "projector_config.pbtxt"
_TENSORS, _METADATA = "tensors.tsv", "metadata.tsv"
_HEADER = "agent\tname\tupdate\n"


class TensorBoard(Tool):
    """Writes what `tensorboard --logdir` shows.

    Not by its usual writer: that one's thread would meet a full disk where nobody can be told.
    """

    def __init__(self, folder: Path | None = None) -> None:
        """Write nothing yet.

        Args:
            folder: Where to; by default `tensorboard` in the run's folder.
        """
        require("tensorboard", "tensorboard", needs="TensorBoard's files need")
        super().__init__()
        self._folder = folder

    def open(self, about: About) -> None:
        """Begin a file of events; what earlier ones hold from `about.first` on no longer counts.

        Args:
            about: The run.
        """
        from tensorboard.compat.proto.event_pb2 import SessionLog

        self._at = self._folder or about.folder / "tensorboard"
        self._at.mkdir(parents=True, exist_ok=True)
        self._names = about.agents
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
        self._file = self._at / name
        self._event(file_version="brain.Event:2")
        self._event(about.first, session_log=SessionLog(status=SessionLog.START))
        self._settings(about)
        for network in self._projected():
            self._keep_before(about.first, network)

    def _event(self, update: int = 0, **what: Any) -> None:  # noqa: ANN401 -- a protobuf's fields
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        event = Event(wall_time=time.time(), step=update, **what)
        with self._file.open("ab") as file:
            RecordWriter(file).write(event.SerializeToString())

    def _summary(self, update: int, *values: dict[str, Any]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        self._event(update, summary=Summary(value=[Summary.Value(**value) for value in values]))

    def _settings(self, about: About) -> None:
        from tensorboard.plugins.text.metadata import create_summary_metadata
        from tensorboard.util.tensor_util import make_tensor_proto

        rows = [f"| {name} | {json.dumps(value)} |" for name, value in about.settings.items()]
        text = "\n".join(["| setting | value |", "| --- | --- |", *rows])
        self._summary(
            about.first,
            {
                "tag": "settings",
                "metadata": create_summary_metadata("settings", ""),
                "tensor": make_tensor_proto([text.encode()]),
            },
        )

    def _numbers(self, update: int, scalars: dict[str, float]) -> None:
        self._summary(
            update, *({"tag": tag, "simple_value": number} for tag, number in scalars.items())
        )

    def _picture(self, update: int, tag: str, rgb: np.ndarray) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        data = io.BytesIO()
        Image.fromarray(rgb).save(data, "PNG")
        height, width, channels = rgb.shape
        image = Summary.Image(
            height=height, width=width, colorspace=channels, encoded_image_string=data.getvalue()
        )
        self._summary(update, {"tag": f"matrix/{tag}", "image": image})

    def _embedding(self, update: int, network: str, rows: xr.DataArray) -> None:
        folder = self._at / network
        folder.mkdir(exist_ok=True)
        finite = np.isfinite(rows.values).all(axis=1)
        agents = rows["agent"].values[finite].tolist()
        with (folder / _METADATA).open("a", encoding="utf-8") as file:
            if not file.tell():
                file.write(_HEADER)
            file.writelines(f"{agent}\t{self._name(agent)}\t{update}\n" for agent in agents)
        with (folder / _TENSORS).open("a", encoding="utf-8") as file:
            np.savetxt(file, rows.values[finite], delimiter="\t", fmt="%.9g")
        self._configure()

    def _name(self, agent: int) -> str:
        name = self._names[agent] if agent < len(self._names) else f"agent {agent}"
        return " ".join(name.split())  # no tabs, no ends of lines

    def _projected(self) -> list[str]:
        """Names of the networks whose embeddings are there."""
        return sorted(file.parent.name for file in self._at.glob(f"*/{_TENSORS}"))

    def _configure(self) -> None:
        """Tell the projector what there is."""
        entries = [
            f'embeddings {{\n  tensor_name: "embedding of the {network}"\n'
            f'  tensor_path: "{network}/{_TENSORS}"\n'
            f'  metadata_path: "{network}/{_METADATA}"\n}}\n'
            for network in self._projected()
        ]
        (self._at / _CONFIG).write_text("".join(entries), encoding="utf-8")

    def _keep_before(self, first: int, network: str) -> None:
        """Drop the embeddings of updates that are made again, and a row that a kill cut in two."""
        folder = self._at / network
        tensors = (folder / _TENSORS).read_text(encoding="utf-8").splitlines(keepends=True)
        metadata = (folder / _METADATA).read_text(encoding="utf-8").splitlines(keepends=True)[1:]
        kept = [
            row.endswith("\n") and numbers.endswith("\n") and int(row.rpartition("\t")[2]) < first
            for row, numbers in zip(metadata, tensors, strict=False)
        ]
        (folder / _METADATA).write_text(
            _HEADER + "".join(compress(metadata, kept)), encoding="utf-8"
        )
        (folder / _TENSORS).write_text("".join(compress(tensors, kept)), encoding="utf-8")

    def _finish(self, state: str) -> None:
        """Nothing is held open, and TensorBoard has no word for a run's state."""
