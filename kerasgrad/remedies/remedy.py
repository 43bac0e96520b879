"""Remedy, the named remedies, and how several are put together into one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import keras

from kerasgrad.layers import IRNN, OmegaSimpleRNN, SimpleRNN, SimplifiedLSTM
from kerasgrad.memory import forget_bias_for_horizon
from kerasgrad.remedies.omega import OmegaSequential, PerturbedSimpleRNN

# What Keras's optimizers can do to a gradient before they use it; each takes one at most.
CLIPPINGS = ("clipnorm", "global_clipnorm", "clipvalue")

_BASELINE = "tanh SimpleRNN"


@dataclass(frozen=True)
class Remedy:
    """One way of building the recurrent layer and of clipping, to be compared with others.

    Each part that is left out is the baseline's: a tanh SimpleRNN in its default start, no
    clipping, `keras.Sequential`. Remedies are put together with +, by name "relu+clipvalue". The
    right one's clipping and options hold where both have some; two layers, or two models, do not
    go together.

    Args:
        description: what it is, for the table.
        layer: layer(units, timesteps, **kwargs) -> a recurrent layer; kwargs are Keras's, such as
            return_sequences. It is called once a run, after the seed is set; initializers must be
            made in there, as Keras's draw their seed when they are made.
        clips: "clipnorm" (True is the same), "global_clipnorm" or "clipvalue": the optimizer gets
            compare's setting of that name.
        options: more keyword arguments for the layer: {"activation": "relu"}.
        model: model(layers) -> the model that is trained.

    Raises:
        ValueError: for clips that Keras does not have.

    Example, a remedy of one's own:

    >>> import keras
    >>> import kerasgrad as kg
    >>> gru = kg.remedies.Remedy(
    ...     "GRU with dropout, clipnorm",
    ...     lambda units, timesteps, **kwargs: keras.layers.GRU(units, dropout=0.1, **kwargs),
    ...     clips=True,
    ... )
    >>> kg.compare(
    ...     kg.tasks.adding_problem(samples=64, timesteps=5), {"gru": gru}, steps=2, verbose=0
    ... ).histories.keys()
    dict_keys([('gru', 0)])
    >>> (kg.remedies.REMEDIES["relu"] + kg.remedies.REMEDIES["global_clipnorm"]).description
    'ReLU SimpleRNN, global_clipnorm'
    """

    description: str
    layer: Callable[..., keras.layers.Layer] | None = None
    clips: bool | str = False
    options: Mapping[str, Any] = field(default_factory=dict)
    model: Callable[[Sequence[keras.layers.Layer]], keras.Model] | None = None

    def __post_init__(self):
        if self.clips not in (True, False, *CLIPPINGS):
            raise ValueError(
                f"clips must be one of {', '.join(map(repr, CLIPPINGS))}, True for 'clipnorm', or "
                f"False. Received: {self.clips!r}."
            )

    @property
    def clipping(self) -> str | None:
        """The argument of Keras's optimizers that clips, or None."""
        return "clipnorm" if self.clips is True else self.clips or None

    def make_layer(self, units: int, timesteps: int, **kwargs: Any) -> keras.layers.Layer:
        """A new recurrent layer.

        Args:
            units: its size.
            timesteps: of the sequences it will see, for a start that depends on them.
            **kwargs: Keras's, such as return_sequences; they take precedence over `options`.
        """
        layer = self.layer or _simple_rnn
        return layer(units, timesteps, **{**self.options, **kwargs})

    def make_model(self, layers: Sequence[keras.layers.Layer]) -> keras.Model:
        """The model of these layers, not compiled."""
        return (self.model or keras.Sequential)(layers)

    def __add__(self, other: Remedy) -> Remedy:
        for part in ("layer", "model"):
            mine, theirs = getattr(self, part), getattr(other, part)
            if mine is not None and theirs is not None and mine is not theirs:
                raise ValueError(
                    f"{self.description!r} and {other.description!r} each bring a {part} of their "
                    f"own, and a network has one. Put together remedies of which one at most does: "
                    f"clipnorm, global_clipnorm, clipvalue, relu, orthogonal, glorot bring none."
                )
        # What makes the layer is named before what is done to it.
        named = [self, other] if self._shapes_layer() else [other, self]
        said = dict.fromkeys(part for remedy in named for part in remedy._said())
        clipping = other.clipping or self.clipping
        return Remedy(
            ", ".join([*(said or [_BASELINE]), *filter(None, [clipping])]),
            layer=self.layer or other.layer,
            clips=clipping or False,
            options={**self.options, **other.options},
            model=self.model or other.model,
        )

    def _shapes_layer(self):
        return self.layer is not None or "activation" in self.options

    def _said(self):
        """What the description says beyond the baseline and the clipping."""
        text = self.description.removesuffix(f", {self.clipping}")
        text = text.removeprefix(_BASELINE).removeprefix(", ")
        return [text] if text else []


def _simple_rnn(units, timesteps, **kwargs):
    return SimpleRNN(units, **kwargs)


def _irnn(units, timesteps, **kwargs):
    return IRNN(units, **kwargs)


def _omega_simple_rnn(units, timesteps, **kwargs):
    return OmegaSimpleRNN(units, **kwargs)


def _perturbed_simple_rnn(units, timesteps, **kwargs):
    return PerturbedSimpleRNN(units, **kwargs)


def _simplified_lstm(units, timesteps, **kwargs):
    bias = forget_bias_for_horizon(timesteps)
    return SimplifiedLSTM(units, project_input=True, forget_bias=bias, **kwargs)


def _keras_lstm(units, timesteps, **kwargs):
    return keras.layers.LSTM(units, **kwargs)


def _keras_gru(units, timesteps, **kwargs):
    return keras.layers.GRU(units, **kwargs)


REMEDIES: Mapping[str, Remedy] = {
    # Keras starts the recurrent kernel orthogonal by default, and so do all that do not say
    # otherwise. `orthogonal` says so outright: by itself it is the baseline once more, bit for bit,
    # and with irnn it is another start. `glorot` is what a kernel would get that is no recurrent
    # one: independent entries of variance 1/units, whose largest singular value is near 2.
    "baseline": Remedy(_BASELINE),
    "clipnorm": Remedy(f"{_BASELINE}, clipnorm", clips=True),
    "global_clipnorm": Remedy(f"{_BASELINE}, global_clipnorm", clips="global_clipnorm"),
    "clipvalue": Remedy(f"{_BASELINE}, clipvalue", clips="clipvalue"),
    "relu": Remedy("ReLU SimpleRNN", options={"activation": "relu"}),
    "relu_clipnorm": Remedy("ReLU SimpleRNN, clipnorm", clips=True, options={"activation": "relu"}),
    "irnn": Remedy("ReLU from the identity (IRNN)", _irnn),
    "irnn_clipnorm": Remedy("ReLU from the identity (IRNN), clipnorm", _irnn, clips=True),
    "orthogonal": Remedy(
        f"{_BASELINE}, orthogonal start (Keras's default)",
        options={"recurrent_initializer": "orthogonal"},
    ),
    "glorot": Remedy(
        f"{_BASELINE}, Glorot start", options={"recurrent_initializer": "glorot_uniform"}
    ),
    "omega_9": Remedy(
        "Ω of Pascanu et al., equation 9, global_clipnorm",
        _perturbed_simple_rnn,
        clips="global_clipnorm",
        model=OmegaSequential,
    ),
    "omega_10": Remedy(
        "Ω of Pascanu et al., equation 10, global_clipnorm",
        _omega_simple_rnn,
        clips="global_clipnorm",
    ),
    "simplified_lstm": Remedy(
        "simplified LSTM, forget bias ln(T/ln 2), clipnorm", _simplified_lstm, clips=True
    ),
    "simplified_lstm_tanh": Remedy(
        "the same with tanh around the state",
        _simplified_lstm,
        clips=True,
        options={"activation": "tanh"},
    ),
    "keras_lstm": Remedy("Keras's LSTM, clipnorm", _keras_lstm, clips=True),
    "keras_gru": Remedy("Keras's GRU, clipnorm", _keras_gru, clips=True),
}

DEFAULT_REMEDIES = (
    "baseline",
    "clipnorm",
    "relu",
    "relu_clipnorm",
    "irnn_clipnorm",
    "simplified_lstm",
)


def by_name(remedies: str | Sequence[str] | Mapping[str, Remedy]) -> dict[str, Remedy]:
    """{name: remedy} of names out of REMEDIES, several of them joined by +, or of a mapping.

    Raises:
        ValueError: for a name that REMEDIES does not have, or remedies that do not go together.

    Example:

    >>> from kerasgrad.remedies import by_name
    >>> by_name("relu+clipvalue")["relu+clipvalue"].clipping
    'clipvalue'
    """
    if isinstance(remedies, Mapping):
        return dict(remedies)
    if isinstance(remedies, str):
        remedies = [remedies]
    parts = {name: name.split("+") for name in remedies}
    unknown = [part for name in parts.values() for part in name if part not in REMEDIES]
    if unknown:
        raise ValueError(
            f"Unknown remedy: {', '.join(map(repr, unknown))}. There are: {', '.join(REMEDIES)}; "
            "+ puts several together, as in relu+clipvalue."
        )
    return {name: _together([REMEDIES[part] for part in parts[name]]) for name in parts}


def _together(remedies):
    first, *others = remedies
    for other in others:
        first = first + other
    return first
