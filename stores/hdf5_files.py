"""Opening HDF5 files to read, without locks: many network file systems grant none, and readers change nothing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vla.stores.errors import MachineError

if TYPE_CHECKING:
    import h5py


def open_hdf5(path: Path) -> h5py.File:
    """Return the open file. Raises what h5py raises, and `MachineError` where HDF5 locks all the same and cannot."""
    import h5py

    # The driver is named: a file may not choose another one, which might open other files.
    try:
        return h5py.File(path, "r", driver="sec2", locking=False)
    except OSError as error:
        if "unable to lock" in str(error):  # the variable outranks what a program asks for
            raise MachineError(f"{path} cannot be locked", fix="export HDF5_USE_FILE_LOCKING=FALSE") from None
        if "locking flag" not in str(error):
            raise
    # Open in this process already, by other code and with locks: HDF5 keeps one choice for a file.
    return h5py.File(path, "r", driver="sec2")
