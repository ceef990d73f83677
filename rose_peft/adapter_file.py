"""Whether the weights beside an adapter's config are whole and ROSE's, checked before PEFT reads them."""

from __future__ import annotations

import os

from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from .errors import AdapterFileError


def check_adapter_file(folder: str) -> None:
    """Look at the names in a folder's weights file; does nothing where there is none, as on the hub.

    PEFT's own errors for such files name neither the file nor the way out, and for weights of another method it only
    warns and trains on from the base weights.

    Args:
        folder: Local folder of an adapter.

    Raises:
        AdapterFileError: If the file is cut off, or holds no weights of ROSE.
    """
    path = os.path.join(folder, SAFETENSORS_WEIGHTS_NAME)
    if not os.path.isfile(path):
        return
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
    except SafetensorError as error:
        raise AdapterFileError(
            f"{path} cannot be read ({error}): it is cut off or no safetensors file. Copy it again, or save the "
            "adapter anew."
        ) from error
    if not any("rose_" in name for name in names):
        example = f", such as {names[0]!r}" if names else ""
        raise AdapterFileError(
            f"{path} holds {len(names)} tensors{example}, and none is ROSE's, but the config beside it says ROSE. Put "
            "config and weights of the same adapter into the folder."
        )
