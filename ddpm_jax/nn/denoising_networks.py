"""The denoising networks, which are the alternatives of `network` in all tasks that denoise.

A file of this directory that defines a denoising network names its class in the last line, as in
`DENOISING_NETWORK = UNet`. `DenoisingNetwork` is the union of these classes.
"""

import functools
import operator
import pathlib
import pkgutil
from typing import TYPE_CHECKING, Any, Protocol, Self

if TYPE_CHECKING:

    class DenoisingNetwork(Protocol):
        """A Flax module that denoises; `UNet` describes its fields and arguments."""

        @property
        def classes(self) -> int:
            """The number of classes; 0 for an unconditional network."""

        def check(self, shape: tuple[int, int, int]) -> None:
            """Raise FieldError if the network does not fit images of this shape."""

        def init(self, rngs: Any, *args: Any) -> Any:
            """Return new parameters, as all Flax modules do."""

        def apply(self, variables: Any, *args: Any) -> Any:
            """Return the output, as all Flax modules do."""

        def clone(self, *, parent: None = None, **fields: Any) -> Self:
            """Return a copy with new values of some fields, as all Flax modules do."""

else:
    _files = sorted(pathlib.Path(__file__).parent.glob("[a-z]*.py"))
    _modules = [pkgutil.resolve_name(f"{__package__}.{path.stem}") for path in _files]
    _networks = [vars(module).get("DENOISING_NETWORK") for module in _modules]
    DenoisingNetwork = functools.reduce(operator.or_, filter(None, _networks))
