"""The union of all denoising networks: the type of the config section `network` of diffusion tasks.

A file of this directory that defines a denoising network assigns the class to the global name
`DENOISING_NETWORK` in the last line.  `DenoisingNetwork` is the union of these classes, such as
UNet | DiT.
"""

import functools
import operator
import pathlib
import pkgutil
from typing import TYPE_CHECKING, Any, Protocol, Self

if TYPE_CHECKING:

    class DenoisingNetwork(Protocol):
        """A denoising network as a Flax module; `UNet` documents the fields and arguments."""

        @property
        def classes(self) -> int:
            """The number of classes; 0 if the network is not conditioned on class labels."""

        def check(self, shape: tuple[int, int, int]) -> None:
            """Raise FieldError if the network cannot be built for images of `shape` [H, W, C]."""

        def init(self, rngs: Any, *args: Any) -> Any:
            """Return new parameters (`flax.linen.Module.init`)."""

        def apply(self, variables: Any, *args: Any) -> Any:
            """Return the output of the network (`flax.linen.Module.apply`)."""

        def clone(self, *, parent: None = None, **fields: Any) -> Self:
            """Return a copy with new values of `fields` (`flax.linen.Module.clone`)."""

else:
    _files = sorted(pathlib.Path(__file__).parent.glob("[a-z]*.py"))
    _modules = [pkgutil.resolve_name(f"{__package__}.{path.stem}") for path in _files]
    _networks = [vars(module).get("DENOISING_NETWORK") for module in _modules]
    DenoisingNetwork = functools.reduce(operator.or_, filter(None, _networks))
