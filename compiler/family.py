"""Model families: data files in ``families/``, and the detection of a family from the tensors of a checkpoint.

A family is one TOML file. It lists the components that hold weights, the text states that the denoiser reads, the names
of its attention modules, the layouts of its single files and configs, and whether it can be trained. A file may extend
another one: it then inherits every key that it does not set, and in a table every key of the table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config

from erasec.documents import read_toml
from erasec.errors import ErasecError

Shape = tuple[int, ...]
FOLDER = Path(str(resources.files("erasec"))) / "families"
# Keys that a family file does not inherit, because they identify one family.
OWN = ("name", "title", "hub", "detect")


@dataclass(frozen=True, order=True)
class Site:
    """One tensor that a pass may edit. The ``shape`` of a matrix is (d_out, d_in).

    ``attn`` is what an attention projection attends to: "self", "cross", "joint" or "context"; "single" where one
    projection serves picture and text. Tensors of text encoders have "text" there, and all others "other". ``proj`` is
    what the projection computes ("q", "k", "v", "out", "embed"), or "" for a tensor that is no projection.
    """

    component: str
    key: str
    shape: Shape
    attn: str
    proj: str
    block: str

    @property
    def label(self) -> str:
        """The name of the site in reports, such as "down.1.attentions.0 cross k"."""
        return f"{self.block} {self.attn} {self.proj}"


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True)
class Part:
    """Rows of text states, one per token. A row is the concatenation of the states of ``encoders``.

    ``state`` selects the last hidden state after the final norm, the penultimate hidden state without it, or the pooled
    state, which is one row per prompt. ``length`` is the number of tokens; 0 means the tokenizer's maximum. If
    ``padded``, rows that are narrower than the sites that read them are padded with zeros.
    """

    encoders: tuple[str, ...]
    state: Literal["last", "penultimate", "pooled"] = "last"
    length: int = 0
    padded: bool = False


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True)
class Stream:
    """Text states that certain sites of the denoiser read: the rows of ``parts``, concatenated along the tokens.

    The sites are those with this ``attn`` and one of these ``projections``.
    """

    name: str
    parts: tuple[Part, ...]
    attn: str
    projections: tuple[str, ...]


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True)
class Rule:
    """Conditions on the names and shapes of tensors. All of them must hold.

    For each entry of ``dimensions``, some tensor of that name has that number of dimensions. For each name in
    ``present`` there is a tensor, and for each in ``absent`` there is none. A "*" in a name matches any text.
    """

    dimensions: Mapping[str, int] = field(default_factory=dict)
    present: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()

    def fits(self, tensors: Mapping[str, Shape]) -> bool:
        """Whether the rule holds for these tensors, shapes by tensor name."""
        dimensions = all(
            any(len(tensors[key]) == count for key in _matching(tensors, name))
            for name, count in self.dimensions.items()
        )
        present = all(_matching(tensors, name) for name in self.present)
        return dimensions and present and not any(_matching(tensors, name) for name in self.absent)


def _matching(tensors: Mapping[str, Shape], name: str) -> list[str]:
    if "*" not in name:
        return [name] if name in tensors else []
    return [key for key in tensors if fnmatchcase(key, name)]


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True)
class SingleFileLayout:
    """How a single file in the original layout (LDM) stores a model of the family.

    ``prefixes`` maps components to the prefixes of their tensor names. ``architecture`` maps prediction types to the
    ModelSpec architecture. ``openclip`` lists the text encoders that use OpenCLIP's layout; if ``drops_last_layer``,
    diffusers folders do not contain the last layer of such an encoder. If ``size_embedding``, the UNet also embeds
    image sizes. A file whose ``global_step`` equals ``epsilon_global_step`` predicts epsilon. ``v_prediction_mark`` and
    ``zero_snr_mark`` are the names of empty tensors that mark v-prediction and a zero terminal SNR.

    The names of a transformer are data. ``modules`` maps each module with a weight and a bias from its name in
    diffusers to its original name, or to that and the form in which the file stores it (``ldm.module_names.FORMS``);
    ``tensors`` maps whole tensor names. "{}" stands for the number of a block, "{last}" for that of the last one. Of
    the text encoders, ``t5`` lists those that are T5's, and ``unprojected`` those whose projection is left out of the
    file: readers take the identity.
    """

    prefixes: Mapping[str, str]
    detect: Rule
    architecture: Mapping[str, str] = field(default_factory=dict)
    modules: Mapping[str, str | tuple[str, str]] = field(default_factory=dict)
    tensors: Mapping[str, str] = field(default_factory=dict)
    t5: tuple[str, ...] = ()
    unprojected: tuple[str, ...] = ()
    openclip: tuple[str, ...] = ()
    drops_last_layer: bool = False
    size_embedding: bool = False
    epsilon_global_step: int = 0
    v_prediction_mark: str = ""
    zero_snr_mark: str = ""


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True)
class TextSizes:
    """Sizes of a CLIP text encoder. ``projection`` is the width of its projection layer, 0 without one.

    ``vocabulary`` and ``positions`` are the numbers of tokens that it knows and that a prompt may have.
    """

    width: int
    layers: int
    mlp: int
    projection: int = 0
    vocabulary: int = 49408
    positions: int = 77


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True)
class Sizes:
    """The sizes in which models of one family differ.

    ``widths`` are the UNet's channels per level. ``depths`` are its transformer blocks per level, 0 for a level without
    attention. ``added`` is the width of SDXL's additional embedding (pooled text and image sizes). ``vae`` are the
    VAE's channels per level, ``inputs`` the UNet's input channels, ``latents`` the channels of a latent image.
    ``layers`` and ``vae_layers`` are the resnets per level.
    """

    widths: tuple[int, ...]
    depths: tuple[int, ...]
    texts: tuple[TextSizes, ...]
    vae: tuple[int, ...]
    added: int = 0
    inputs: int = 4
    latents: int = 4
    layers: int = 2
    vae_layers: int = 2


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True)
class EpsilonConfigs:
    """Config values of a model that predicts epsilon, in a family whose models usually predict v."""

    image_size: int
    scheduler: Mapping[str, Any]


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True)
class ConfigLayout:
    """Config values of a family that cannot be read from tensors. Folders made from a single file need them.

    ``activations`` and ``pad_tokens`` have one entry per text encoder. ``head_channels`` is the number of channels per
    attention head; 0 means 8 heads at every level. ``projected`` lists the text encoders with a projection layer; the
    others state ``projection_dim`` in their configs, or their own width where it is 0. If ``older_names``, the
    published folders use the VAE's older attention names. ``model_index``, ``unet`` and ``vae`` are additional entries
    of these config files. ``sizes`` are "full", the published model, and "tiny", a small one for tests.
    """

    pipeline: str
    image_size: int
    scaling_factor: float
    activations: tuple[str, ...]
    pad_tokens: tuple[str, ...]
    scheduler: Mapping[str, Any]
    sizes: Mapping[str, Sizes]
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"
    epsilon: EpsilonConfigs | None = None
    head_channels: int = 0
    projected: tuple[str, ...] = ()
    projection_dim: int = 0
    older_names: bool = False
    model_index: Mapping[str, Any] = field(default_factory=dict)
    unet: Mapping[str, Any] = field(default_factory=dict)
    vae: Mapping[str, Any] = field(default_factory=dict)


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True)
class JointConfigs:
    """Config values of a family of transformers that cannot be read from tensors, as in ``ConfigLayout``.

    ``transformer``, ``vae`` and ``scheduler`` are entries of these configs; ``unguided`` replaces entries of the
    scheduler where the transformer embeds no guidance. ``head_size`` is the number of channels per attention head.
    ``published`` lists the published transformers, each by its number of (dual) blocks and its width.
    """

    pipeline: str
    activations: tuple[str, ...]
    pad_tokens: tuple[str, ...]
    projected: tuple[str, ...]
    head_size: int
    transformer: Mapping[str, Any]
    vae: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    published: tuple[tuple[int, int], ...]
    unguided: Mapping[str, Any] = field(default_factory=dict)


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True)
class Family:
    """One family of models: its components, the text states that its denoiser reads, and its layouts.

    ``components`` hold the weights. A folder may lack those in ``optional``; the text states then omit their rows.
    ``denoiser`` is the component that predicts, ``denoiser_class`` its class in diffusers. ``attentions`` maps an
    attention module to its matrices, and each matrix to (what it attends to, what it computes). ``embeddings`` maps
    further matrices that read text to what they embed. ``pooled`` names the stream that the denoiser embeds with the
    size of the picture and the timestep, where it has one besides token states. ``single_stream`` are prefixes of
    blocks in which one set of matrices serves picture and text. ``flow`` says that the denoiser predicts velocities of
    a rectified flow, and ``even_sigmas`` that its pipeline samples it at even steps of sigma, before the shift.
    ``packing`` is the number of latents that the denoiser reads as channels of one place. If ``distilled``, guidance is
    part of its predictions: it has no unconditional one, and a pipeline predicts once in a step. If ``trainable``,
    learned passes can run the denoiser; which of them do so depends on what they need of it (``training.base.NEEDS``).
    ``hub`` maps aliases to repositories. ``lora`` is the metadata of LoRA files.
    ``presets`` are options of passes that suit its models (see ``erasec.recipe.presets``).
    """

    name: str
    title: str
    components: tuple[str, ...]
    streams: tuple[Stream, ...]
    detect: Rule
    denoiser: str
    denoiser_class: str
    attentions: Mapping[str, Mapping[str, tuple[str, str]]]
    embeddings: Mapping[str, str] = field(default_factory=dict)
    optional: tuple[str, ...] = ()
    pooled: str = ""
    single_stream: tuple[str, ...] = ()
    flow: bool = False
    even_sigmas: bool = False
    packing: int = 1
    distilled: bool = False
    trainable: bool = False
    hub: Mapping[str, str] = field(default_factory=dict)
    single_file: SingleFileLayout | None = None
    configs: ConfigLayout | None = None
    joint_configs: JointConfigs | None = None
    lora: Mapping[str, str] = field(default_factory=dict)
    presets: Mapping[str, Any] = field(default_factory=dict)

    @property
    def text_encoders(self) -> tuple[str, ...]:
        """The text encoders that the denoiser reads, sorted."""
        parts = (part for stream in self.streams for part in stream.parts)
        return tuple(sorted({name for part in parts for name in part.encoders}))

    def without(self, component: str) -> Family:
        """The family without a component. Raises ErasecError if the component is not optional."""
        if component not in self.optional:
            raise ErasecError(
                f"{self.name} cannot do without {component}",
                why=f"optional components of {self.name}: {', '.join(self.optional) or 'none'}",
            )
        return self.only(tuple(name for name in self.components if name != component))

    def only(self, components: Sequence[str]) -> Family:
        """The family with these components alone; its streams lack the parts of other text encoders."""
        streams = tuple(
            replace(stream, parts=tuple(part for part in stream.parts if set(components).issuperset(part.encoders)))
            for stream in self.streams
        )
        return replace(self, components=tuple(components), streams=streams)


def read_families(folder: Path = FOLDER) -> dict[str, Family]:
    """Read a folder of family files. Returns the families by name.

    Raises ErasecError that names the file and the key at fault.
    """
    contents = {}
    for path in sorted(folder.glob("*.toml")):
        contents[path.stem] = read_toml(path, path.name)
    adapter = TypeAdapter(Family)
    families = {}
    for stem in contents:
        try:
            family = adapter.validate_python(_extended(stem, contents, ()))
        except (ValidationError, ErasecError) as error:
            why = _validation_fault(error) if isinstance(error, ValidationError) else f"{error.what}: {error.why}"
            raise ErasecError(f"{stem}.toml does not describe a family", why=why, where=str(folder)) from error
        if family.name in families:
            raise ErasecError(
                f"{stem}.toml describes the family {family.name}, which another file describes too",
                why=f"two families are named {family.name}",
                fix=f'give one of them another name, as in   name = "{stem}"',
                where=str(folder),
            )
        families[family.name] = family
    return families


def _validation_fault(error: ValidationError) -> str:
    """One fault of a family file, with its key. An unknown key comes first: it may be a missing one, misspelled."""
    faults = sorted(error.errors(), key=lambda fault: fault["type"] != "unexpected_keyword_argument")
    key = ".".join(map(str, faults[0]["loc"]))
    if faults[0]["type"] == "unexpected_keyword_argument":
        return f"there is no key {key}"
    return f"{key}: {faults[0]['msg']}"


def _extended(stem: str, contents: Mapping[str, dict[str, Any]], seen: tuple[str, ...]) -> dict[str, Any]:
    """The content of a family file together with what it inherits. ``seen`` are the files that extend this one."""
    content = dict(contents[stem])
    parent = content.pop("extends", None)
    if parent is None:
        return content
    if parent not in contents or parent in (*seen, stem):
        raise ErasecError(
            f"{stem}.toml extends {parent!r}", why="there is no such file, or the files extend each other"
        )
    inherited = _extended(parent, contents, (*seen, stem))
    for key, value in inherited.items():
        if key in OWN:
            continue
        own = content.get(key)
        if isinstance(value, dict) and isinstance(own, dict):
            content[key] = {**value, **own}
        elif own is None:
            content[key] = value
    return content


FAMILIES = read_families()
HUB = {alias: repository for family in FAMILIES.values() for alias, repository in family.hub.items()}

# What the matrices of a text encoder compute, by module: those of CLIP, and those of T5.
TEXT_PROJECTIONS = {
    "q_proj": "q",
    "k_proj": "k",
    "v_proj": "v",
    "out_proj": "out",
    "fc1": "mlp",
    "fc2": "mlp",
    "q": "q",
    "k": "k",
    "v": "v",
    "o": "out",
    "wi": "mlp",
    "wi_0": "mlp",
    "wi_1": "mlp",
    "wo": "mlp",
}


def detect(denoiser: Mapping[str, Shape]) -> Family:
    """Detect the family from the denoiser's tensors, shapes by tensor name.

    Raises ErasecError if no family's rule fits, or more than one: with a guess, the wrong matrices would be edited.
    """
    fitting = [family for family in FAMILIES.values() if family.detect.fits(denoiser)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        names = " and ".join(family.name for family in fitting)
        raise ErasecError(
            f"this denoiser fits {names}",
            why="the [detect] rules of these families do not exclude each other",
            fix="make the [detect] table in one of their files stricter",
        )
    first = ", ".join(f"{key} {shape}" for key, shape in sorted(denoiser.items())[:3])
    raise ErasecError(
        "this denoiser belongs to no family that erasec knows",
        why=f"it has {len(denoiser)} tensors ({first}, ...); known: {', '.join(FAMILIES)}",
        fix="use a model of a known family, or add a file for its family to compiler/families",
    )


def parameters(family: Family, component: str, tensors: Mapping[str, Shape]) -> tuple[Site, ...]:
    """Every tensor of a component as a Site, including biases and convolutions, in the order of their names.

    Of the denoiser, that includes the sites that ``sites`` returns. A bias has its matrix's ``attn`` and ``proj``.
    """
    denoiser = component == family.denoiser
    projections = {site.key: site for site in sites(family, tensors)} if denoiser else {}
    result = []
    for key, shape in sorted(tensors.items()):
        matrix = projections.get(key.removesuffix(".bias") + ".weight") if key.endswith(".bias") else None
        if key in projections:
            result.append(projections[key])
        elif matrix is not None:
            result.append(replace(matrix, key=key, shape=shape))
        else:
            parts = key.removeprefix("text_model.").split(".")
            block = ".".join(parts[:-2]).replace("_blocks", "") or parts[0]
            projection = TEXT_PROJECTIONS.get(parts[-2], "") if len(parts) > 1 else ""
            result.append(
                Site(component, key, shape, "other", "", block)
                if denoiser
                else Site(component, key, shape, "text", projection, f"{component} {block}")
            )
    return tuple(result)


def sites(family: Family, tensors: Mapping[str, Shape]) -> tuple[Site, ...]:
    """Every attention projection and text embedding of a family's denoiser, in the order of their names."""
    component = family.denoiser
    result = []
    for key, shape in sorted(tensors.items()):
        if len(shape) != 2 or not key.endswith(".weight"):
            continue
        parts = key.split(".")
        module = next((part for part in parts if part in family.attentions), "")
        matrices = family.attentions.get(module, {})
        matrix = next((part for part in parts if part in matrices), "")
        if key in family.embeddings:
            result.append(Site(component, key, shape, family.embeddings[key], "embed", key.removesuffix(".weight")))
        elif matrix:
            block = ".".join(parts[: parts.index(module)]).replace(".transformer_blocks", "").replace("_blocks", "")
            attn, proj = matrices[matrix]
            attn = "single" if key.startswith(family.single_stream) else attn
            result.append(Site(component, key, shape, attn, proj, block))
    return tuple(result)
