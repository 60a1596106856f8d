"""Files of plain data: trees of numbers, strings, arrays and tensors, without pickle.

A file is a safetensors file. Its tensors are those of the tree; its metadata have the rest of the
tree as JSON, the version of the format, and the SHA-256 digest of all bytes of the file. Reading
one builds plain data only: names of classes in it are looked up in what the reader passes, and
nothing is imported or called for them.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import re
import secrets
from collections.abc import Callable, Collection, Sequence
from pathlib import Path, PurePath
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from sklearn_maml.exceptions import FileFormatError

# raised with every change after which versions would misread each other's files
FORMAT = 5
# entries of the metadata
DOCUMENT, VERSION, DIGEST = "sklearn_maml", "format", "sha256"
_NO_DIGEST = "0" * 64
_DIGEST_KEY = f'"{DIGEST}":"'.encode()
# safetensors' own limit
MAX_HEADER = 100_000_000
# what stands for all that JSON has no word for is a dict with this key
TAG = "$"
# lists of numbers, and of dicts, that are at least so long are stored as tensors
PACKED = 32

_TORCH_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
        torch.float16, torch.bfloat16, torch.float32, torch.float64,
    )
}  # fmt: skip
# arrays of other dtypes (strings, dates, complex and unsigned numbers) are stored as bytes
_AS_TENSOR = {"|b1", "|u1", "|i1", "<i2", "<i4", "<i8", "<f2", "<f4", "<f8"}
_DTYPE = re.compile(r"[<|](b1|[iu][1248]|f[248]|c8|c16|f16|c32|[SU]\d+|[mM]8(\[\d*\w+\])?)")
# bits of numbers for which numpy has no dtype
BFLOAT16 = np.dtype([("bfloat16", "<i2")])
_LISTS: dict[type, tuple[str, torch.dtype]] = {
    bool: ("bool", torch.bool),
    int: ("int", torch.int64),
    float: ("float", torch.float64),
}


class Encoder:
    """Turns a tree of plain data into JSON and named tensors.

    Parameters
    ----------
    other : callable (value, encoder, path) -> JSON dict or None, default=None
        Asked about what is no plain data; None refuses it. Keys of its result, besides that of
        the tag, are its own.

    Attributes
    ----------
    tensors : dict of str to Tensor
        Named by their place in the tree, on the CPU, contiguous, without shared memory. Tensors
        that are one and the same have one entry.
    """

    def __init__(self, other: Callable[[Any, Encoder, str], Any] | None = None) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._other = other
        self._names: dict[Any, str] = {}
        self._alive: list[Tensor] = []  # whose addresses are in use as keys

    def encode(self, value: Any, path: str) -> Any:
        """Return the JSON of a value; TypeError if something in it is no plain data.

        `path` is its place in the tree, for messages and names of tensors.
        """
        kind = type(value)
        if value is None or kind in (bool, int, str):
            return value
        if kind is float:
            return value if np.isfinite(value) else {TAG: "float", "value": repr(value)}
        if kind is list:
            return self._list(value, path)
        if kind in (tuple, torch.Size):
            return {TAG: "tuple", "items": self._items(value, path)}
        if kind is dict:
            return self._dict(value, path)
        if isinstance(value, np.generic) and value.dtype.kind not in "OV":
            array = np.asarray(value, dtype=value.dtype.newbyteorder("<"))
            return {TAG: "scalar", "dtype": array.dtype.str, "bytes": array.tobytes().hex()}
        if kind is np.ndarray and value.dtype.kind != "V":
            return self._array(value, path)
        if isinstance(value, Tensor):
            return {TAG: "tensor", "name": self._add(value.detach(), path)}
        if kind is torch.device:
            return {TAG: "device", "name": str(value)}
        if kind is torch.dtype and str(value).removeprefix("torch.") in _TORCH_DTYPES:
            return {TAG: "torch.dtype", "name": str(value).removeprefix("torch.")}
        if isinstance(value, np.dtype) and _DTYPE.fullmatch(value.newbyteorder("<").str):
            return {TAG: "dtype", "name": value.newbyteorder("<").str}
        if isinstance(value, PurePath):
            return {TAG: "path", "name": str(value)}
        if kind is datetime.datetime:
            return {TAG: "datetime", "value": value.isoformat()}
        if kind is np.random.RandomState:
            state = value.get_state(legacy=True)
            return {TAG: "RandomState", "state": self.encode(tuple(state), f"{path}/state")}
        node = None if self._other is None else self._other(value, self, path)
        if node is None:
            raise TypeError(
                f"{path} is a {kind.__module__}.{kind.__qualname__}, which cannot be stored. Only "
                "numbers, strings, None, arrays, tensors, and lists, tuples and dicts of them can."
            )
        return node

    def forget_since(self, names: Collection[str]) -> None:
        """Forget the tensors but those of these names, after a value could not be encoded."""
        self.tensors = {name: t for name, t in self.tensors.items() if name in names}
        self._names = {key: name for key, name in self._names.items() if name in names}

    def _items(self, values: Sequence[Any], path: str) -> list[Any]:
        return [self.encode(value, f"{path}/{k}") for k, value in enumerate(values)]

    def _dict(self, value: dict[Any, Any], path: str) -> Any:
        keys, values = list(value), list(value.values())
        if len(value) < PACKED and TAG not in value and all(type(key) is str for key in keys):
            return {key: self.encode(item, f"{path}/{key}") for key, item in value.items()}
        return {
            TAG: "dict",
            "keys": self._list(keys, f"{path}/keys"),
            "values": self._list(values, f"{path}/values"),
        }

    def _list(self, value: list[Any], path: str) -> Any:
        """Return the items one by one, unless they are many of a kind."""
        kinds = {*map(type, value)}
        if len(value) < 2 or len(kinds) > 1:
            return self._items(value, path)
        (kind,) = kinds
        if kind is list:
            joined = [item for part in value for item in part]
            return {
                TAG: "lists",
                "lengths": self._list([*map(len, value)], f"{path}/lengths"),
                "items": self._list(joined, f"{path}/items"),
            }
        if len(value) < PACKED:
            return self._items(value, path)
        if kind is dict:
            return self._records(value, path)
        if kind is str:
            text = json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")
            name = self._add(torch.frombuffer(bytearray(text), dtype=torch.uint8), path)
            return {TAG: "list", "of": "str", "name": name}
        if kind in _LISTS and (kind is not int or all(-(2**63) <= v < 2**63 for v in value)):
            of, dtype = _LISTS[kind]
            return {
                TAG: "list",
                "of": of,
                "name": self._add(torch.tensor(value, dtype=dtype), path),
            }
        return self._items(value, path)

    def _records(self, value: list[dict[Any, Any]], path: str) -> Any:
        """Return dicts column by column, for all that have the same keys in the same order."""
        shapes: dict[tuple[Any, ...], int] = {}
        which = [shapes.setdefault(tuple(item), len(shapes)) for item in value]
        if len(shapes) > 8:
            return self._items(value, path)
        return {
            TAG: "records",
            "which": self._list(which, f"{path}/which"),
            "keys": self._items([list(keys) for keys in shapes], f"{path}/keys"),
            "columns": [
                [
                    self._list(
                        [item[key] for item, own in zip(value, which, strict=True) if own == shape],
                        f"{path}/{shape}/{key}",
                    )
                    for key in keys
                ]
                for keys, shape in shapes.items()
            ],
        }

    def _array(self, value: np.ndarray, path: str) -> Any:
        node: dict[str, Any] = {TAG: "array", "shape": list(value.shape)}
        if value.dtype.kind == "O":
            return {**node, "items": self._list(value.ravel().tolist(), path)}
        flat = np.array(value, dtype=value.dtype.newbyteorder("<"), order="C").reshape(-1)
        dtype = flat.dtype.str
        if dtype not in _AS_TENSOR:
            if not _DTYPE.fullmatch(dtype):
                raise TypeError(f"{path} is an array of {value.dtype}, which cannot be stored.")
            flat = np.frombuffer(flat.tobytes(), dtype=np.uint8).copy()
        return {**node, "dtype": dtype, "name": self._add(torch.from_numpy(flat), path)}

    def _add(self, tensor: Tensor, path: str) -> str:
        if tensor.layout != torch.strided or tensor.dtype not in _TORCH_DTYPES.values():
            raise TypeError(
                f"{path} is a tensor of {tensor.dtype} and layout {tensor.layout}, which cannot be "
                "stored."
            )
        key = (tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and key in self._names:
            return self._names[key]
        if path in self.tensors:  # keys of a dict may be spelt alike
            path = f"{path}#{len(self.tensors)}"
        self._names[key] = path
        self._alive.append(tensor)
        # a copy: what is written may share no memory
        self.tensors[path] = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)
        return path


class Decoder:
    """Turns JSON and tensors back into the tree they were made from.

    Parameters
    ----------
    tensors : dict of str to Tensor
    other : callable (node, decoder) -> value, default=None
        Asked about the dicts that `Encoder`'s `other` returned; raises for those it did not.
    """

    def __init__(
        self,
        tensors: dict[str, Tensor],
        other: Callable[[dict[str, Any], Decoder], Any] | None = None,
    ) -> None:
        self.tensors = tensors
        self._other = other

    def decode(self, node: Any) -> Any:
        """Return the value of some JSON; any exception means that it was not made by `Encoder`."""
        if isinstance(node, list):
            return [self.decode(item) for item in node]
        if not isinstance(node, dict):
            return node
        if TAG not in node:
            return {key: self.decode(item) for key, item in node.items()}
        make = self._kinds.get(str(node[TAG]))
        if make is not None:
            return make(self, node)
        if self._other is None:
            raise ValueError(f"{node[TAG]!r} is not known")
        return self._other(node, self)

    def _lists(self, node: Any) -> list[Any]:
        ends = np.cumsum(self.decode(node["lengths"])).tolist()
        items = self.decode(node["items"])
        if ends[-1] != len(items):
            raise ValueError("the lengths of the parts are not those of the whole")
        return [items[a:b] for a, b in zip([0, *ends], ends, strict=False)]

    def _list(self, node: Any) -> list[Any]:
        values = self.tensors[node["name"]]
        if node["of"] == "str":
            text = values.numpy().tobytes().decode("utf-8", "surrogatepass")
            return list(map(str, json.loads(text)))
        return list(values.tolist())

    def _records(self, node: Any) -> list[dict[Any, Any]]:
        rows = [
            iter(zip(*map(self.decode, columns), strict=True) if columns else [])
            for columns in node["columns"]
        ]
        keys = self.decode(node["keys"])
        return [
            dict(zip(keys[k], next(rows[k], ()), strict=True)) for k in self.decode(node["which"])
        ]

    def _array(self, node: Any) -> np.ndarray:
        shape = tuple(map(int, node["shape"]))
        if "items" in node:
            items = self.decode(node["items"])
            flat = np.empty(len(items), dtype=object)
            flat[:] = items
        else:
            flat = self.tensors[node["name"]].numpy()
            dtype = _read_dtype(node["dtype"])
            if node["dtype"] not in _AS_TENSOR:
                flat = np.frombuffer(flat.tobytes(), dtype=dtype)
            # a copy: what is used twice in a file must not be changed twice
            flat = flat.astype(dtype, copy=True)
        return flat.reshape(shape)

    def _random_state(self, node: Any) -> np.random.RandomState:
        generator = np.random.RandomState(0)
        generator.set_state(self.decode(node["state"]))
        return generator

    # how values are made of nodes, by what `TAG` says; nothing else in a file is
    _kinds: ClassVar[dict[str, Callable[[Decoder, Any], Any]]] = {
        "float": lambda decoder, node: float(node["value"]),
        "tuple": lambda decoder, node: tuple(map(decoder.decode, node["items"])),
        "dict": lambda decoder, node: dict(
            zip(decoder.decode(node["keys"]), decoder.decode(node["values"]), strict=True)
        ),
        "lists": _lists,
        "list": _list,
        "records": _records,
        "scalar": lambda decoder, node: np.frombuffer(
            bytes.fromhex(node["bytes"]), dtype=_read_dtype(node["dtype"])
        )[0],
        "array": _array,
        "tensor": lambda decoder, node: decoder.tensors[node["name"]],
        "device": lambda decoder, node: torch.device(str(node["name"])),
        "torch.dtype": lambda decoder, node: _TORCH_DTYPES[node["name"]],
        "dtype": lambda decoder, node: _read_dtype(node["name"]),
        "datetime": lambda decoder, node: datetime.datetime.fromisoformat(node["value"]),
        "path": lambda decoder, node: Path(str(node["name"])),
        "RandomState": _random_state,
    }


def _read_dtype(name: Any) -> np.dtype:
    if not isinstance(name, str) or not _DTYPE.fullmatch(name):
        raise ValueError(f"{name!r} is no dtype of numbers, strings or dates")
    return np.dtype(name)


def as_array(tensor: Tensor) -> np.ndarray:
    """Return a tensor of an `Encoder` as an array; one that numpy has no dtype for, as its bits."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(BFLOAT16)
    return tensor.numpy()


def as_tensor(array: np.ndarray) -> Tensor:
    """Return the tensor of which `as_array` made an array."""
    if array.dtype == BFLOAT16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def digest_of(value: Any, other: Callable[[Any, Encoder, str], Any] | None = None) -> str:
    """Digest that equal trees of plain data have in common, in every process.

    Parameters
    ----------
    value : object
    other : callable, default=None
        As of `Encoder`.
    """
    if isinstance(value, list):
        value = [_summary(item) for item in value]
    encoder = Encoder(other)
    node = encoder.encode(value, "value")
    digest = hashlib.sha256(json.dumps(node, sort_keys=True).encode())
    for name, tensor in sorted(encoder.tensors.items()):
        digest.update(f"{name}{tensor.dtype}{list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _summary(value: Any) -> Any:
    """Digest of an array where it lies: it may be all the data of a fit; else the value."""
    if type(value) is not np.ndarray or value.dtype.kind in "OV" or not value.flags.c_contiguous:
        return value
    content = hashlib.sha256(value.reshape(-1).view(np.uint8).data).hexdigest()
    return [value.dtype.str, list(value.shape), content]


# -- files -----------------------------------------------------------------------------------------


def write_tree(path: Any, tree: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write JSON and tensors of an `Encoder` to a file, then the new one or the old one."""
    # here: models that are neither saved nor loaded do without it
    from safetensors.torch import save

    path = Path(path)
    document = json.dumps(tree, allow_nan=False)
    if len(document) > MAX_HEADER // 2:
        raise ValueError(
            f"What describes the model takes {len(document)} characters, more than a safetensors "
            "file has room for."
        )
    metadata = {DOCUMENT: document, VERSION: str(FORMAT), DIGEST: _NO_DIGEST}
    data = memoryview(save(tensors, metadata))
    place = bytes(data[: 8 + _header_length(data)]).index(_DIGEST_KEY) + len(_DIGEST_KEY)
    digest = hashlib.sha256(data).hexdigest().encode()
    # not a name of the system's choice, whose files only their owner may read
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with open(part, "xb") as file:
            file.write(data[:place])
            file.write(digest)
            file.write(data[place + len(digest) :])
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # so that the new name outlives a loss of power, too
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def read_tree(path: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the JSON and the tensors that `write_tree` wrote.

    FileFormatError if the file is something else, is not whole, was changed, or is of a later
    version.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    path = Path(path)
    data = path.read_bytes()
    metadata, header_end = _metadata(path, data)
    version = metadata.get(VERSION, "")
    if not version.isascii() or not version.isdigit() or int(version) < 1:
        raise FileFormatError(f"{path} has the format version {version!r}; expected {FORMAT}.")
    if int(version) < FORMAT:
        raise FileFormatError(
            f"{path} has the format version {version}, of an earlier sklearn_maml, and this one "
            f"reads {FORMAT}: what a model learns has changed since. Fit it anew and save it; for "
            "predictions as they were, load it with the version that wrote it."
        )
    if int(version) > FORMAT:
        raise FileFormatError(
            f"{path} has the format version {version}, but this version of sklearn_maml reads up "
            f"to {FORMAT}. Read it with a newer version of sklearn_maml."
        )
    place = data.find(_DIGEST_KEY, 0, header_end) + len(_DIGEST_KEY)
    digest = hashlib.sha256(data[:place])
    digest.update(_NO_DIGEST.encode())
    digest.update(memoryview(data)[place + len(_NO_DIGEST) :])
    if metadata.get(DIGEST) != digest.hexdigest():
        raise FileFormatError(
            f"{path} was changed or damaged after it was written: its SHA-256 digest is not the "
            "one that it has on record. Take another copy of the file."
        )
    try:
        tree = json.loads(metadata[DOCUMENT])
        # copies: memory that begins where tensors usually do
        tensors = {name: tensor.clone() for name, tensor in load(data).items()}
    except (SafetensorError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise FileFormatError(f"{path} is not well-formed: {error}") from error
    if not isinstance(tree, dict):
        raise FileFormatError(f"{path} is not well-formed: it describes no model.")
    return tree, tensors


def _header_length(data: Any) -> int:
    return int.from_bytes(data[:8], "little")


def _metadata(path: Path, data: bytes) -> tuple[dict[str, str], int]:
    """Read the metadata of a safetensors file, and where its header ends."""
    end = 8 + _header_length(data)
    if len(data) < 8 or end > min(len(data), MAX_HEADER):
        raise FileFormatError(
            f"{path} is not a safetensors file, or only the beginning of one: it has {len(data)} "
            "bytes. Expected a file written by the save method of an estimator."
        )
    try:
        header = json.loads(data[8:end])
        metadata = header["__metadata__"]
        found = {key: str(metadata[key]) for key in (DOCUMENT, VERSION, DIGEST)}
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise FileFormatError(
            f"{path} was not written by sklearn_maml, or is damaged: the metadata of a model are "
            "missing. Expected a file written by the save method of an estimator."
        ) from error
    return found, end
