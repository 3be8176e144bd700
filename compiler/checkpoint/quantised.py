"""Files with quantised weights, recognised by their first bytes or their header, and refused in words.

Edits change weights by less than quantisation rounds them, and what comes out would be rounded a second time.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from erasec.errors import ErasecError

GGUF = b"GGUF"  # the first bytes of such a file
FLOAT8 = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
# Ends of the names of tensors that quantised files hold beside their weights: the scales of ComfyUI's fp8 files, of
# torchao and compressed-tensors, and the tables of bitsandbytes.
SCALES = ("scaled_fp8", ".scale_weight", ".scale_input", ".weight_scale", ".weight_scale_inv", ".comfy_quant")
TABLES = (".absmax", ".quant_map", ".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4")


def quantised(what: str, where: Path) -> ErasecError:
    """The error for ``what`` holds quantised weights, which says what to give instead."""
    return ErasecError(
        f"{what} holds quantised weights",
        why="they are rounded to few bits for inference, and an edit is smaller than the rounding",
        fix="give the model that it was made from, in float16, bfloat16 or float32, and quantise the result",
        where=str(where),
    )


def refuse_gguf(file: Path, first: bytes) -> None:
    """Raise ErasecError if the ``first`` bytes of ``file`` are those of GGUF."""
    if first.startswith(GGUF):
        raise quantised(f"the GGUF file {file.name}", file)


def refuse_dtypes(file: Path, dtypes: Iterable[str], known: Iterable[str]) -> None:
    """Raise ErasecError for a dtype that is not in ``known``; for 8-bit floats, the error says what to give instead."""
    unknown = sorted(set(dtypes) - set(known))
    if not unknown:
        return
    if eight := [FLOAT8[dtype] for dtype in unknown if dtype in FLOAT8]:
        raise quantised(f"the fp8 file {file.name} ({' and '.join(eight)})", file)
    raise ErasecError(
        f"{file.name} holds tensors of the dtype {unknown[0]}",
        why=f"supported dtypes: {', '.join(known)}",
        fix="use the model's float16 or float32 file",
        where=str(file),
    )


def refuse_scales(file: Path, names: Iterable[str]) -> None:
    """Raise ErasecError if a model's tensor ``names`` include the scales or tables of quantised weights."""
    if marks := sorted(name for name in names if name.endswith((*SCALES, *TABLES))):
        raise quantised(f"{file.name}, which has the scales {marks[0]},", file)
