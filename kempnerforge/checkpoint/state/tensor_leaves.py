"""Encode torch and numpy values that are inside values stored as JSON.

=========================  =================================================================================
value                      JSON
=========================  =================================================================================
tensor                     ``{"__tensor__": {"name": ...}}``: the tensor is stored under this name; with
                           ``device`` unless it is the CPU, and, if they apply, ``sharded`` (a DTensor),
                           ``parameter``, ``requires_grad``
numpy array                ``{"__ndarray__": {"dtype": "<f4", "shape": [...], "data": base64}}``, or, above
                           4 KiB, ``"tensor": name`` instead of ``data``
numpy scalar               ``{"__numpy__": ["<f4", base64]}``
torch.Size, dtype, device  ``{"__size__": [...]}``, ``{"__dtype__": "bfloat16"}``, ``{"__device__": "cpu"}``
=========================  =================================================================================
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from kempnerforge.checkpoint.format import json_values
from kempnerforge.checkpoint.state.pieces import check_storable
from kempnerforge.errors import MismatchError

_INLINE_BYTES = 4096
"""Numpy arrays up to this size are stored in the JSON."""
SMALL_BYTES = 1 << 20
"""CPU tensors up to this size are copied when packed, because their owner may change them."""


class Packer:
    """Converts values to JSON, and collects the tensors in them by name."""

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}

    def pack(self, value: Any, *, name: str) -> Any:
        """Return ``value`` as JSON.

        Raises TypeError, which names the leaf, and ValueError for duplicate names.
        """
        return json_values.encode(value, name=name, foreign=self._foreign)

    def _foreign(self, value: Any, name: str) -> Any:
        if isinstance(value, torch.Tensor):
            return {"__tensor__": self._tensor(value, name)}
        if isinstance(value, torch.Size):
            return {"__size__": list(value)}
        if isinstance(value, torch.dtype):
            return {"__dtype__": str(value).removeprefix("torch.")}
        if isinstance(value, torch.device):
            return {"__device__": str(value)}
        if isinstance(value, np.generic) and not value.dtype.hasobject and value.dtype.names is None:
            return {"__numpy__": [value.dtype.str, base64.b64encode(value.tobytes()).decode()]}
        if type(value) is np.ndarray:
            if value.dtype.hasobject or value.dtype.names is not None:
                raise TypeError(f"{name} is a numpy array of {value.dtype}, which a checkpoint cannot hold")
            return {"__ndarray__": self._array(value, name)}
        return None

    def _tensor(self, value: torch.Tensor, name: str) -> dict[str, Any]:
        check_storable(name, value)
        tag: dict[str, Any] = {"name": name}
        if value.device.type != "cpu":
            tag["device"] = value.device.type
        if isinstance(value, nn.Parameter):
            tag["parameter"] = True
        if value.requires_grad:
            tag["requires_grad"] = True
        if isinstance(value, DTensor) and type(value.to_local()) is torch.Tensor:
            tag["sharded"] = True
        elif type(value) not in (torch.Tensor, nn.Parameter):
            raise TypeError(
                f"{name} is a {type(value).__name__} inside a value: use a plain tensor or a DTensor"
            )
        elif value.device.type == "cpu" and value.nbytes <= SMALL_BYTES:
            value = value.detach().clone()
        self.add(name, value)
        return tag

    def _array(self, value: np.ndarray[Any, Any], name: str) -> dict[str, Any]:
        tag: dict[str, Any] = {"dtype": value.dtype.str, "shape": list(value.shape)}
        if value.nbytes > _INLINE_BYTES:
            self.add(name, torch.frombuffer(bytearray(value.tobytes()), dtype=torch.uint8))
            return {**tag, "tensor": name}
        return {**tag, "data": base64.b64encode(value.tobytes()).decode()}

    def add(self, name: str, value: torch.Tensor) -> None:
        """Add a tensor by name. Raises ValueError if the name is taken."""
        if name in self.tensors:
            raise ValueError(f"two leaves are called {name}")
        self.tensors[name] = value


class Unpacker:
    """Converts JSON back to values. ``make`` creates the tensors in them, which are filled afterwards.

    ``make`` is called with a tensor's name in the checkpoint, and the content of its tag.
    """

    def __init__(self, make: Callable[[str, dict[str, Any]], torch.Tensor]) -> None:
        self._make = make
        self.tensors: dict[str, torch.Tensor] = {}
        """Tensors to fill, by name."""

    def unpack(self, encoded: Any) -> Any:
        """Return the value that ``Packer.pack`` has encoded."""
        return json_values.decode(encoded, self._foreign)

    def _foreign(self, tag: str, content: Any) -> Any:
        if tag == "__tensor__":
            tensor, needs_grad = self._tensor(content["name"], content), bool(content.get("requires_grad"))
            if content.get("parameter"):
                return nn.Parameter(tensor, requires_grad=needs_grad)
            return tensor.detach().requires_grad_() if needs_grad else tensor
        if tag == "__size__":
            return torch.Size(content)
        if tag == "__dtype__":
            found = getattr(torch, content, None)
            if not isinstance(found, torch.dtype):
                raise MismatchError(f"this version of torch has no dtype {content}")
            return found
        if tag == "__device__":
            return torch.device(content)
        if tag == "__numpy__":
            raw, kind = base64.b64decode(content[1]), np.dtype(content[0])
            # frombuffer refuses items of size 0, such as empty text.
            return np.frombuffer(raw, dtype=kind)[0] if kind.itemsize else np.zeros(1, kind)[0]
        dtype, shape = np.dtype(content["dtype"]), tuple(content["shape"])
        if "tensor" in content:
            return self._tensor(content["tensor"], content).numpy().view(dtype).reshape(shape)
        raw = bytearray(base64.b64decode(content["data"]))
        return np.frombuffer(raw, dtype=dtype).reshape(shape) if raw else np.empty(shape, dtype)

    def _tensor(self, name: str, tag: dict[str, Any]) -> torch.Tensor:
        if name not in self.tensors:
            self.tensors[name] = self._make(name, tag)
        return self.tensors[name]


def tensor_tags(encoded: Any) -> dict[str, dict[str, Any]]:
    """Return the tensors inside ``encoded``: name -> content of the tag."""
    found: dict[str, dict[str, Any]] = {}

    def note(tag: str, content: Any) -> None:
        if tag == "__tensor__":
            found[content["name"]] = content
        elif tag == "__ndarray__" and "tensor" in content:
            found[content["tensor"]] = content

    json_values.decode(encoded, note)
    return found


def tensor_names(encoded: Any) -> set[str]:
    """Return the names of the tensors inside ``encoded``."""
    return set(tensor_tags(encoded))
