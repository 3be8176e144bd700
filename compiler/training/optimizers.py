"""The AdamW of a training: torch's, or one of bitsandbytes whose moments take a quarter of the memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from erasec.errors import require_modules

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.optim import Optimizer

# By name: the class in bitsandbytes ("" for torch's own), and the bytes on the device of the two moments of a number.
# Moments of 8 bits have a scale for each block of 256 (Dettmers et al., arXiv:2110.02861); those of "adamw-paged" may
# be moved to the memory of the host when the device has none left.
OPTIMIZERS: dict[str, tuple[str, float]] = {
    "adamw": ("", 8.0),
    "adamw-8bit": ("AdamW8bit", 2.03),
    "adamw-paged": ("PagedAdamW8bit", 0.0),
}


def optimizer_class(name: str) -> Callable[..., Optimizer]:
    """The class of an optimizer of ``OPTIMIZERS``. Raises MissingTool where bitsandbytes is needed and not installed.

    Both libraries take parameters, lr, betas, eps and weight_decay in this order.
    """
    if not OPTIMIZERS[name][0]:
        from torch.optim import AdamW

        return AdamW
    require_modules(f"the optimizer {name}", ("bitsandbytes",), "memory")
    import bitsandbytes

    kind: Callable[..., Optimizer] = getattr(bitsandbytes.optim, OPTIMIZERS[name][0])
    return kind
