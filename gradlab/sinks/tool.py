"""What the built-in sinks have in common: numbers at once, pictures and embeddings now and then."""

from abc import ABC, abstractmethod

import numpy as np
import xarray as xr

from gradlab.sinks.picture import heatmap
from gradlab.sinks.record import Record
from gradlab.sinks.sink import About

PICTURES_EVERY = 10


class Tool(ABC):
    """Sends single numbers of every update, and of some diagnosed ones pictures and embeddings.

    Some: the first, every `PICTURES_EVERY`-th after it, and the last.
    """

    def __init__(self) -> None:
        self._diagnosed = 0
        self._unseen: Record | None = None

    @abstractmethod
    def open(self, about: About) -> None:
        """Begin; see `Sink.open`."""

    def write(self, record: Record) -> None:
        """Send what is to be sent of a record; see `Sink.write`."""
        if record.scalars:
            self._numbers(record.update, record.scalars)
        if record.matrices or record.embeddings:
            self._unseen = record
            if self._diagnosed % PICTURES_EVERY == 0:
                self._show()
            self._diagnosed += 1

    def close(self, state: str) -> None:
        """Send the last pictures, and end; see `Sink.close`."""
        try:
            self._show()
        finally:
            self._finish(state)

    def _show(self) -> None:
        record, self._unseen = self._unseen, None
        if record is not None:
            for tag, values in record.matrices.items():
                self._picture(record.update, tag, heatmap(values))
            for network, rows in record.embeddings.items():
                self._embedding(record.update, network, rows)

    @abstractmethod
    def _numbers(self, update: int, scalars: dict[str, float]) -> None: ...

    @abstractmethod
    def _picture(self, update: int, tag: str, rgb: np.ndarray) -> None: ...

    @abstractmethod
    def _embedding(self, update: int, network: str, rows: xr.DataArray) -> None: ...

    @abstractmethod
    def _finish(self, state: str) -> None: ...
